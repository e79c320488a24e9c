"""The encoder against transformers: random BERTs, and the real all-MiniLM-L6-v2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from deepseek.errors import ConfigError, FormatError, ShapeError
from deepseek.models import Encoder, EncoderConfig
from deepseek.models.families import build_model, config_from_hf, config_to_hf, state_from_hf
from tests.models.zoo import randomize
from tests.tolerances import assert_logits_equal

FIELDS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}


def pair(**changes: object) -> tuple[transformers.BertModel, Encoder]:
    theirs = transformers.BertModel(transformers.BertConfig(**FIELDS | changes)).eval()
    randomize(theirs)
    config = config_from_hf(theirs.config.to_dict())
    model = build_model(config)
    model.load_state_dict(state_from_hf(config, theirs.state_dict()))
    assert isinstance(model, Encoder)
    return theirs, model.eval()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("padded", [False, True])
def test_states_equal_transformers(activation: str, padded: bool) -> None:
    theirs, model = pair(hidden_act=activation)
    tokens, types = torch.randint(0, 99, (3, 67)), torch.randint(0, 2, (3, 67))
    mask = torch.ones(3, 67, dtype=torch.long)
    if padded:
        mask[1, 30:], mask[2, 66:] = 0, 0
    with torch.no_grad():
        expected = theirs(tokens, mask, types, output_hidden_states=True)
        actual = model(tokens, mask, types, output_hidden_states=True)
    assert actual.pooler_output is not None and actual.hidden_states is not None
    held = mask.bool()
    assert_logits_equal(actual.last_hidden_state[held], expected.last_hidden_state[held])
    assert_logits_equal(actual.pooler_output, expected.pooler_output)
    for mine, reference in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_logits_equal(mine[held], reference[held])


def test_gradients_equal_transformers() -> None:
    theirs, model = pair()
    tokens = torch.randint(0, 99, (2, 20))
    theirs(tokens).last_hidden_state.square().sum().backward()
    model(tokens).last_hidden_state.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("pooler"):
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-2)


def test_config_goes_there_and_back() -> None:
    _, model = pair()
    assert config_from_hf(config_to_hf(model.config)) == model.config
    assert EncoderConfig.from_dict(model.config.to_dict()) == model.config


def test_bad_inputs_are_refused() -> None:
    _, model = pair()
    with pytest.raises(ShapeError, match=r"at most 80 tokens; got 81. Cut the text"):
        model(torch.zeros(1, 81, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"attention_mask of Encoder"):
        model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 7))
    with pytest.raises(ConfigError, match=r"tokenizer of Encoder.embed must be loaded"):
        model.embed(["text"])


def test_minilm_embeddings_equal_transformers(minilm_folder: Path) -> None:
    from deepseek.hub import load

    model = load(minilm_folder)
    assert isinstance(model, Encoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    theirs = transformers.AutoModel.from_pretrained(minilm_folder, dtype=torch.float32).eval()
    texts = ["A cat sat.", "Ein Satz über Katzen 🐈, etwas länger.", "", "x " * 900]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = theirs(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    assert_logits_equal(model.embed(texts, batch_size=2), expected)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_goes_through_a_bundle(pooling: str, normalize: bool, tmp_path: Path) -> None:
    from deepseek import hub

    _, model = pair()
    model.config = model.config.replace(pooling=pooling, normalize=normalize, max_embed_tokens=17)
    hub.save(model, tmp_path / "bundle")
    again = hub.load(tmp_path / "bundle")
    assert again.config == model.config


def test_an_unknown_pooling_is_refused(tmp_path: Path) -> None:
    from deepseek import hub

    _, model = pair()
    folder = hub.save(model, tmp_path / "bundle").path
    (folder / "bundle.json").unlink()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(FormatError, match=r"pooling mode of .*1_Pooling must be one of"):
        hub.load(folder)
