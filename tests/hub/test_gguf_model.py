"""From a GGUF file to a Hugging Face model: names, layouts, configs and what has to be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from deepseek.errors import FormatError
from deepseek.hub import load
from deepseek.hub.gguf import read_gguf
from deepseek.hub.gguf_model import generation_config, hf_config, hf_tensors, tensor_shapes
from deepseek.hub.loading import check_weights
from tests.hub.tiny import llama3_tensor, tiny_decoder, write_gguf

QWEN2 = {"model_type": "qwen2"}
QWEN3 = {"model_type": "qwen3", "attention_bias": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "llama with a head each": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", QWEN2),
    "qwen3": ("qwen3", {**QWEN3, "head_dim": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_as_it_was(tmp_path: Path, case: str) -> None:
    architecture, changes = CASES[case]
    model = tiny_decoder(**changes)
    path = write_gguf(tmp_path / "a.gguf", model, architecture)
    loaded = load(path)
    assert loaded.tokenizer is None
    assert loaded.config.replace(eos_token_id=2) == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("case", ["llama", "llama untied", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    architecture, changes = CASES[case]
    if case == "qwen3":
        changes = {**changes, "head_dim": 16}  # transformers does not read it from the file
    kind = gguf.GGMLQuantizationType.Q8_0
    extra = {"tokenizer.ggml.tokens": [f"t{index}" for index in range(96)]}
    path = write_gguf(tmp_path / "a.gguf", tiny_decoder(**changes), architecture, kind, extra)
    file = read_gguf(path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="a.gguf")
    config.head_dim = 16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", config=config
    ).state_dict()
    ours = dict(hf_tensors(file))
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q8_0"])
def test_dtype_follows_the_file_or_the_wish(tmp_path: Path, kind: str) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "a.gguf", tiny_decoder(), kind=stored)
    own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert {value.dtype for value in load(path).parameters()} == {own}
    assert load(path, dtype="bfloat16").dtype == torch.bfloat16


SCALINGS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "none": ({"llama.rope.scaling.type": "none"}, {"scaling": "default"}),
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"scaling": "linear", "factor": 4.0},
    ),
    "old linear": ({"llama.rope.scale_linear": 2.0}, {"scaling": "linear", "factor": 2.0}),
    "yarn": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 32,
        },
        {"scaling": "yarn", "factor": 4.0, "original_max_positions": 32},
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling_is_read(tmp_path: Path, case: str) -> None:
    extra, expected = SCALINGS[case]
    rope = load(write_gguf(tmp_path / "a.gguf", tiny_decoder(), extra=extra)).config.rope
    assert {name: getattr(rope, name) for name in expected} == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again(tmp_path: Path, factor: float) -> None:
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    divisors = llama3_tensor(16, factor, 500000.0)
    assert divisors.min() == 1
    assert divisors.max() == factor
    path = write_gguf(tmp_path / "a.gguf", tiny_decoder(**changes), divisors=divisors)
    rope = load(path).config.rope
    assert (rope.scaling, rope.factor, rope.original_max_positions) == ("llama3", factor, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)


def test_llama3_divisors_are_those_of_transformers() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, rope_parameters=scaling
    )
    scaled, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    expected = plain / scaled.double()
    np.testing.assert_allclose(llama3_tensor(64, 32.0, 500000.0), expected, rtol=1e-5)


REFUSED: dict[str, dict[str, object]] = {
    "architecture": {"general.architecture": "gemma3"},
    "experts": {"llama.expert_count": 8},
    "rope scaling": {"llama.rope.scaling.type": "longrope"},
    "partial rotation": {"llama.rope.dimension_count": 8},
    "values of another size": {"llama.attention.value_length": 8},
    "heads": {"llama.attention.head_count_kv": 3},
    "no heads": {"llama.attention.head_count": 0},
    "text for a number": {"llama.block_count": "two"},
    "number for text": {"general.architecture": 5},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_cannot_say_is_refused(tmp_path: Path, case: str) -> None:
    file = read_gguf(write_gguf(tmp_path / "a.gguf", tiny_decoder()))
    changed = type(file)(
        file.path, file.version, {**file.metadata, **REFUSED[case]}, file.tensors, file.data
    )
    with pytest.raises(FormatError, match="must be"):
        hf_config(changed)


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "llama.embedding_length",
        "llama.attention.head_count",
        "llama.block_count",
        "llama.context_length",
        "llama.feed_forward_length",
        "llama.attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_value_is_named(tmp_path: Path, key: str) -> None:
    file = read_gguf(write_gguf(tmp_path / "a.gguf", tiny_decoder()))
    rest = {name: value for name, value in file.metadata.items() if name != key}
    with pytest.raises(FormatError, match=key):
        hf_config(type(file)(file.path, file.version, rest, file.tensors, file.data))


def test_other_divisors_are_refused(tmp_path: Path) -> None:
    divisors = np.linspace(1, 4, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "a.gguf", tiny_decoder(), divisors=divisors)
    with pytest.raises(FormatError, match=r"rope_freqs"):
        load(path)


def test_strange_tensors_are_refused(tmp_path: Path) -> None:
    file = read_gguf(write_gguf(tmp_path / "a.gguf", tiny_decoder()))
    for name in ("blk.0.ssm_a.weight", "cls.output.weight"):
        tensors = {**file.tensors, name: file.tensors["output_norm.weight"]}
        odd = type(file)(file.path, file.version, file.metadata, tensors, file.data)
        with pytest.raises(FormatError, match="a tensor of a llama model"):
            dict(hf_tensors(odd))


def test_missing_layers_are_counted(tmp_path: Path) -> None:
    model = tiny_decoder()
    extra = {"llama.block_count": 3}
    path = tmp_path / "a.gguf"
    file = read_gguf(write_gguf(path, model))
    assert hf_config(file)["num_hidden_layers"] == 2
    changed = type(file)(
        file.path, file.version, {**file.metadata, **extra}, file.tensors, file.data
    )
    with pytest.raises(FormatError, match=r"9 missing \(model\.layers\.2\..*, …\)"):
        check_weights(hf_config(changed), tensor_shapes(changed), "a.gguf")


def test_a_turn_may_end_with_another_token_than_a_text(tmp_path: Path) -> None:
    extra = {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
    }
    file = read_gguf(write_gguf(tmp_path / "a.gguf", tiny_decoder(), extra=extra))
    assert generation_config(file) == {"bos_token_id": 1, "eos_token_id": [0, 2]}
