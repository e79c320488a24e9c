"""GGUF files out: the numbers and ids that our own reader, gguf's, transformers and llama.cpp
find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.export import write_gguf
from deepseek.hub import Quantized
from deepseek.hub.gguf_model import gguf_name, hf_name
from deepseek.models import Decoder
from tests.grids import Kind, put_on_grids
from tests.hub.test_gguf_tokenizer import DIGITS, TEXTS
from tests.hub.tiny import tiny_decoder, tiny_tokenizer
from tests.models.zoo import ours, reference

Kinds = dict[str, Kind]
GRIDS: dict[str, tuple[Kinds, set[str]]] = {
    "int4": ({"": (4, 32, False)}, {"Q4_1"}),
    "symmetric": ({"": (4, 32, True)}, {"Q4_0"}),
    "int8": ({"": (8, 32, True)}, {"Q8_0"}),
    "wide groups": ({"embed": (8, 64, True), "mlp": (8, None, True), "": (4, 64, False)}, set()),
    "narrow groups": ({"mlp": (4, 16, True), "": (4, 32, True)}, {"F32", "Q4_0"}),
    "int8 with zero points": ({"": (8, 32, False)}, {"F32"}),
    "rotated": ({"down": (8, 32, True), "": (8, 64, True, True)}, {"F32", "Q8_0"}),
}


def stored(folder: Path, kinds: Kinds, **changes: Any) -> Decoder:
    model = tiny_decoder(vocab_size=330, **changes)
    model.tokenizer = tiny_tokenizer()
    weights = put_on_grids(model, kinds)
    hub.save(model, folder, quantized=Quantized(weights=weights), license="Apache-2.0")
    loaded = hub.load(folder)
    assert isinstance(loaded, Decoder)
    return loaded


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", GRIDS)
def test_weights_on_grids_keep_their_numbers(tmp_path: Path, case: str, tied: bool) -> None:
    kinds, expected = GRIDS[case]
    model = stored(tmp_path / "a", kinds, tie_word_embeddings=tied, attention_bias=True)
    types = write_gguf(tmp_path / "a", tmp_path / "a.gguf")
    matrices = {kind for name, kind in types.items() if "norm" not in name and "bias" not in name}
    assert matrices == (expected or {"Q8_0", "Q4_1"})
    back = hub.load(tmp_path / "a.gguf", dtype="float32")
    assert set(back.state_dict()) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert not (tmp_path / ".a.gguf.part").exists()


@pytest.mark.parametrize("floats", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "llama3-rope"])
def test_models_on_no_grid(tmp_path: Path, case: str, floats: Any) -> None:
    if case == "llama3-rope":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        model = tiny_decoder(rope_parameters=rope)
    else:
        model = ours(reference(case))
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[floats]
    write_gguf(model, tmp_path / "a.gguf", floats=floats)
    back = hub.load(tmp_path / "a.gguf", dtype="float32")
    for name, value in model.state_dict().items():
        rounded = value.to(dtype).float() if value.dim() > 1 else value
        assert torch.equal(back.state_dict()[name], rounded), name
    tokens = torch.randint(0, 90, (1, 20))
    if floats == "F32":
        with torch.inference_mode():
            torch.testing.assert_close(
                back(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5
            )


def test_a_bundle_keeps_its_dtype(tmp_path: Path) -> None:
    hub.save(tiny_decoder().to(torch.bfloat16), tmp_path / "a")
    types = write_gguf(hub.Bundle.open(tmp_path / "a"), tmp_path / "a.gguf")
    assert types["token_embd.weight"] == "BF16"
    assert types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("case", ["int4", "symmetric", "int8"])
def test_the_reader_of_gguf_finds_the_same(tmp_path: Path, case: str) -> None:
    model = stored(tmp_path / "a", GRIDS[case][0])
    write_gguf(model, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = model.state_dict()
    for tensor in reader.tensors:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if any(part in tensor.name for part in ("attn_q", "attn_k", "norm")):
            continue  # their rows are reordered, or they are vectors
        name = next(name for name in values if gguf_name(name) == tensor.name)
        assert np.array_equal(found, values[name].numpy()), name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.license"] == "Apache-2.0"
    assert fields["general.file_type"] == {"int4": 3, "symmetric": 2, "int8": 7}[case]


def test_a_tokenizer_comes_back(tmp_path: Path) -> None:
    model = stored(tmp_path / "a", GRIDS["int4"][0])
    write_gguf(model, tmp_path / "a.gguf")
    back = hub.load(tmp_path / "a.gguf")
    one, other = model.tokenizer, back.tokenizer
    assert one is not None
    assert other is not None
    for text in (*TEXTS, *DIGITS):
        assert other.encode(text) == one.encode(text)
        assert other.decode(one.encode(text)) == one.decode(one.encode(text))
    assert (other.bos_token_id, other.eos_token_id) == (one.bos_token_id, one.eos_token_id)
    assert other.chat_template == one.chat_template


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import pre_tokenizers

    model = tiny_decoder(vocab_size=330)
    model.tokenizer = tiny_tokenizer()
    cut = tokenizers.Regex(r"\p{N}{1,2}")
    model.tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(cut, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(ConfigError, match="tokenizer"):
        write_gguf(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["qwen3-moe", "deepseek-v3", "dynamic"])
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    if case == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        model = tiny_decoder(rope_parameters=rope)
    else:
        model = ours(reference(case))
    with pytest.raises(ConfigError, match="plain decoder"):
        write_gguf(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_names_are_those_that_are_read(tmp_path: Path) -> None:
    model = stored(tmp_path / "a", GRIDS["int4"][0], attention_bias=True)
    write_gguf(model, tmp_path / "a.gguf")
    from deepseek.hub.gguf import read_gguf

    file = read_gguf(tmp_path / "a.gguf")
    assert {gguf_name(hf_name(file, name)) for name in file.tensors} == set(file.tensors)
    with pytest.raises(ConfigError, match="GGUF"):
        gguf_name("model.layers.0.mlp.experts.gate.weight")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["int4", "int8"])
def test_transformers_reads_the_file(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = stored(tmp_path / "a", GRIDS[case][0])
    write_gguf(model, tmp_path / "a.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32
    )
    tokens = torch.randint(0, 300, (1, 30))
    with torch.inference_mode():
        found, expected = theirs(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("floats", ["F32", "BF16"])
def test_llama_cpp_writes_what_we_write(tmp_path: Path, smollm2_folder: Path, floats: Any) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = smollm2_folder
    write_gguf(folder, tmp_path / "a.gguf", floats=floats)
    model = hub.load(folder, dtype="float32")
    assert isinstance(model, Decoder)
    prompt = "The capital of France is"
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_ctx=256, verbose=False)
    found = theirs(prompt, max_tokens=32, temperature=0.0)
    from deepseek.generate import generate

    expected = generate(model, prompt, max_tokens=32)
    assert not isinstance(expected, list)
    assert found["choices"][0]["text"] == expected.text
