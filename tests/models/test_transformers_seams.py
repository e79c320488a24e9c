"""What transformers and PEFT do with our models: the Auto classes, LoRA, generation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.models import Decoder
from deepseek.models.presets import preset
from tests.models.zoo import ours, randomize, reference
from tests.tolerances import assert_logits_equal

LOADS = """
{imports}
import torch
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32).eval()
tokens = torch.arange(1, 41)[None]
logits = model(tokens).logits
out = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
torch.save((type(model).__name__, logits, out), {result!r})
"""
ORDERS = [
    "import deepseek\nfrom transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM\nimport deepseek",
    "import transformers as t\nimport deepseek\nAutoModelForCausalLM = t.AutoModelForCausalLM",
]


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS)
@pytest.mark.parametrize("name", ["r1-67b", "7b"])
def test_auto_classes_load_our_bundles_in_a_fresh_process(
    name: str, imports: str, tmp_path: Path
) -> None:
    config = preset(name).sized("tiny")
    if name == "7b":
        config = config.replace(family="deepseek_stack", positions="alibi", tie_embeddings=True)
    model = Decoder(config).eval()
    randomize(model)
    hub.save(model, tmp_path / "bundle")
    result = tmp_path / "result.pt"
    program = LOADS.format(imports=imports, folder=str(tmp_path / "bundle"), result=str(result))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, logits, out = torch.load(result, weights_only=True)
    assert kind == "DeepseekStackForCausalLM"
    with torch.no_grad():
        tokens = torch.arange(1, 41)[None]
        assert_logits_equal(logits.detach(), model(tokens).logits)
        for _ in range(3):
            best = model(tokens, last_only=True).logits.argmax(-1)
            tokens = torch.cat((tokens, best), dim=1)
    assert torch.equal(out, tokens)


def test_lora_trains_saves_reloads_and_merges(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = ours(reference("llama"))
    tokens = torch.randint(0, 97, (4, 24))
    with torch.no_grad():
        before = base(tokens).logits
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        assert_logits_equal(model(input_ids=tokens).logits, before)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    model.eval()
    again = PeftModel.from_pretrained(ours(reference_as(base)), tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        assert_logits_equal(again(input_ids=tokens).logits, expected)
        merged = again.merge_and_unload()
        assert isinstance(merged, Decoder)
        assert_logits_equal(merged(tokens).logits, expected)


def reference_as(model: Decoder) -> torch.nn.Module:
    """Return transformers' model with the frozen weights of a model that LoRA wraps."""
    theirs = reference("llama")
    frozen = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    theirs.load_state_dict(frozen)
    return theirs


def test_a_lora_model_generates(smollm2_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    import deepseek

    base = deepseek.load(smollm2_folder, dtype="bfloat16")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model.generate("The capital of France is", max_tokens=3).text.startswith(" Paris")


def test_auto_config_alone_knows_our_family() -> None:
    program = (
        "import deepseek, sys\nfrom transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('deepseek_stack')).__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[:1] == ["DeepseekStackConfig"], done.stderr


def test_the_transformers_class_computes_with_the_head_it_shows() -> None:
    from deepseek.autoclasses.config import DeepseekStackConfig
    from deepseek.autoclasses.model import DeepseekStackForCausalLM
    from deepseek.errors import ConfigError
    from deepseek.models.families import config_to_hf

    config = preset("7b").sized("tiny").replace(family="deepseek_stack")
    model = DeepseekStackForCausalLM(DeepseekStackConfig(**config_to_hf(config))).eval()
    tokens = torch.arange(9)[None]
    model.lm_head = torch.nn.Linear(config.hidden_size, 11)
    assert model(tokens).logits.shape == (1, 9, 11)
    with pytest.raises(ConfigError, match=r"output_attentions of DeepseekStackForCausalLM"):
        model(tokens, output_attentions=True)
    assert model.accepts_loss_kwargs is False


def test_a_loaded_model_can_be_pickled_and_copied(tmp_path: Path) -> None:
    import copy
    import pickle

    import deepseek

    folder = deepseek.save(Decoder(preset("7b").sized("tiny")), tmp_path / "bundle").path
    model = deepseek.load(folder)
    expected = model.generate([1, 2, 3], max_tokens=4).token_ids
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert again.generate([1, 2, 3], max_tokens=4).token_ids == expected
