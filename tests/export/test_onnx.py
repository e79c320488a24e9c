"""ONNX files out: what ONNX Runtime computes with them against the model they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.export import Reader, export, open_exported
from deepseek.export.onnx.rounding import int4_groups, int8_rows
from deepseek.hub import Quantized
from deepseek.hub.grids import grids_of
from deepseek.models import Decoder, Encoder
from deepseek.models.config import EncoderConfig
from tests.grids import Kind, put_on_grids
from tests.hub.tiny import tiny_decoder
from tests.models.zoo import ours, reference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}


def bundle_of(model: Decoder | Encoder, folder: Path, kinds: dict[str, Kind] | None = None) -> Path:
    weights = put_on_grids(model, kinds) if kinds else {}
    quantized = Quantized(weights=weights) if weights else None
    hub.save(model, folder, quantized=quantized)
    return folder


def written(tmp_path: Path, model: Decoder | Encoder, **options: Any) -> Reader:
    export(bundle_of(model, tmp_path / "bundle"), "onnx", tmp_path / "out", **options)
    return open_exported(tmp_path / "out")


def padded(lengths: list[int], sides: list[bool], vocabulary: int) -> tuple[Any, Any]:
    """Return ids and mask of rows of these lengths, padded on the left where a side is true."""
    most = max(lengths)
    ids = torch.randint(0, vocabulary, (len(lengths), most))
    mask = torch.zeros_like(ids)
    for row, (length, is_left) in enumerate(zip(lengths, sides, strict=True)):
        mask[row, most - length if is_left else 0 : most if is_left else length] = 1
    return ids, mask


def assert_same(reader: Reader, model: Decoder | Encoder, ids: Any, mask: Any) -> None:
    found = reader.forward(ids.numpy(), mask.numpy())
    with torch.inference_mode():
        output = model(ids, mask)
    expected = output.logits if reader.kind != "encoder" else output.last_hidden_state
    if reader.kind == "classifier":
        np.testing.assert_allclose(found, expected.numpy(), **CLOSE)
        return
    kept = mask.bool().numpy()
    np.testing.assert_allclose(found[kept], expected.numpy()[kept], **CLOSE)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "llama-mqa-biased",
        "llama-wide-heads",
        "qwen2",
        "qwen3",
        "mistral-window",
        "llama-llama3",
        "llama-yarn",
    ],
)
def test_families_compute_the_same(tmp_path: Path, case: str, optimize: bool) -> None:
    model = ours(reference(case))
    assert isinstance(model, Decoder)
    reader = written(tmp_path, model, optimize=optimize)
    assert (reader.kind, reader.max_tokens) == ("decoder", model.config.max_positions)
    for lengths, sides in (([5], [False]), ([1], [True]), ([7, 3, 5], [False, True, False])):
        assert_same(reader, model, *padded(lengths, sides, model.config.vocab_size))


@pytest.mark.parametrize("optimize", [False, True])
def test_steps_go_on_from_a_cache(tmp_path: Path, optimize: bool) -> None:
    model = tiny_decoder(attention_bias=True)
    reader = written(tmp_path, model, optimize=optimize)
    assert reader.has_cache
    ids = torch.randint(0, 90, (3, 21))
    with torch.inference_mode():
        expected = model(ids).logits.numpy()
    first, state = reader.step(ids[:, :4].numpy(), None)
    parts, place = [first], 4
    for length in (1, 1, 6, 9):
        again, _ = reader.step(ids[:, place : place + length].numpy(), state)
        found, after = reader.step(ids[:, place : place + length].numpy(), state)
        np.testing.assert_array_equal(again, found)
        parts.append(found)
        state, place = after, place + length
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, **CLOSE)


def tiny_encoder(labels: int = 0, activation: str = "gelu") -> Encoder:
    config = EncoderConfig(
        vocab_size=80,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        max_positions=48,
        activation=cast("Any", activation),
        labels=tuple(f"class{number}" for number in range(labels)),
    )
    model = Encoder(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_encoders_and_classifiers(
    tmp_path: Path, optimize: bool, labels: int, activation: str
) -> None:
    model = tiny_encoder(labels, activation)
    reader = written(tmp_path, model, optimize=optimize)
    assert (reader.kind, reader.has_cache) == ("classifier" if labels else "encoder", False)
    sides = [False, False, False] if labels else [False, True, False]
    assert_same(reader, model, *padded([48, 5, 9], sides, 80))
    assert_same(reader, model, *padded([1], [False], 80))
    with pytest.raises(ConfigError, match="decoder"):
        reader.step(np.zeros((1, 1), np.int64), None)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_layers_are_those_of_the_source(tmp_path: Path, kind: str, optimize: bool) -> None:
    model = tiny_decoder() if kind == "decoder" else tiny_encoder()
    reader = written(tmp_path, model, optimize=optimize)
    ids, mask = padded([9, 6], [False, True], 80)
    found = reader.layers(ids.numpy(), mask.numpy())
    with torch.inference_mode():
        expected = model(ids, mask, output_hidden_states=True).hidden_states
    assert found is not None
    assert expected is not None
    assert len(found) == len(expected) - 1 == model.config.num_layers
    for one, other in zip(found, expected[1:], strict=True):
        kept = mask.bool().numpy()
        np.testing.assert_allclose(one[kept], other.numpy()[kept], **CLOSE)


GRIDS: dict[str, dict[str, Kind]] = {
    "int4": {"": (4, 32, False)},
    "symmetric int4": {"": (4, 32, True)},
    "int8 by rows": {"": (8, None, True)},
    "int8 in groups": {"": (8, 32, True)},
    "int8 with zero points": {"": (8, 32, False)},
    "int8 rows with zero points": {"": (8, None, False)},
    "rotated": {"down": (8, 32, True), "": (8, 64, True, True)},
    "rotated rows": {"down": (8, None, True), "": (8, None, True, True)},
    "static": {"embed": (8, None, True), "": (8, None, True, False, 0.1)},
    "mixed": {"embed": (8, 64, True), "q_proj": (8, None, True), "": (4, 32, False)},
    "odd groups": {"mlp.down": (4, 48, False), "": (4, 32, True)},
    "narrow groups": {"mlp": (4, 8, True), "": (4, 32, True)},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", GRIDS)
def test_weights_on_grids_keep_their_numbers(tmp_path: Path, case: str, tied: bool) -> None:
    model = tiny_decoder(tie_word_embeddings=tied, attention_bias=True)
    folder = bundle_of(model, tmp_path / "bundle", GRIDS[case])
    made = export(folder, "onnx", tmp_path / "out", activations="float32")
    assert any("grids" in note for note in made.notes)
    source = hub.load(folder)
    ids, mask = padded([9, 6], [False, True], 90)
    assert_same(open_exported(tmp_path / "out"), source, ids, mask)
    export(folder, "onnx", tmp_path / "rounded", optimize=True)
    found = open_exported(tmp_path / "rounded").forward(ids.numpy(), mask.numpy())
    with torch.inference_mode():
        expected = source(ids, mask).logits.numpy()
    kept = mask.bool().numpy()
    distance = np.sqrt(np.square(found - expected)[kept].mean())
    assert distance < (0.4 if case == "static" else 0.1) * expected[kept].std()


def test_codes_are_the_bytes_of_the_bundle(tmp_path: Path) -> None:
    kinds: dict[str, Kind] = {"o_proj": (8, None, True), "down": (4, 32, True)}
    folder = bundle_of(tiny_decoder(), tmp_path / "bundle", kinds)
    export(folder, "onnx", tmp_path / "out")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    for name, stored in grids_of(hub.Bundle.open(folder)).items():
        grid, codes = stored.read(), held[f"{name}.codes"]
        if grid.bits == 8:
            assert np.array_equal(codes.view(np.uint8) ^ 128, grid.codes)
        else:
            nibbles = np.stack((codes & 15, codes >> 4), -1).reshape(grid.codes.shape)
            assert np.array_equal(nibbles, grid.codes)
        assert np.array_equal(held[f"{name}.scale"].reshape(grid.scale.shape), grid.scale)


def test_static_inputs_are_quantize_and_dequantize(tmp_path: Path) -> None:
    folder = bundle_of(tiny_decoder(), tmp_path / "bundle", GRIDS["static"])
    export(folder, "onnx", tmp_path / "out")
    nodes = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("QuantizeLinear") == 4 * 2
    assert not {node.domain for node in nodes} - {""}, "every runtime reads it"


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["decoder", "encoder", "classifier"])
def test_rounding_here_is_that_of_its_functions(tmp_path: Path, quantize: str, kind: str) -> None:
    model = tiny_decoder() if kind == "decoder" else tiny_encoder(3 if kind == "classifier" else 0)
    folder = bundle_of(model, tmp_path / "bundle")
    small = export(folder, "onnx", tmp_path / "a", quantize=quantize, activations="float32")
    whole = export(folder, "onnx", tmp_path / "whole")
    assert any(quantize in note for note in small.notes)
    sizes = [made.files[1].stat().st_size for made in (small, whole)]
    assert sizes[0] < 0.75 * sizes[1]
    for name, parameter in model.named_parameters():
        is_exact = "position" in name or "token_type" in name or "classifier" in name
        if parameter.dim() == 2 and not is_exact:
            is_table = "embed" in name or "lm_head" in name or "pooler" in name
            round_it = int8_rows if quantize == "int8" or is_table else int4_groups
            parameter.data.copy_(torch.from_numpy(round_it(parameter.detach().numpy()).values()))
    ids, mask = padded([9, 6], [False, False], 80)
    assert_same(open_exported(tmp_path / "a"), model, ids, mask)
    export(folder, "onnx", tmp_path / "b", quantize=quantize)
    found = open_exported(tmp_path / "b").forward(ids.numpy(), mask.numpy())
    assert np.isfinite(found).all()


SIZES = st.sampled_from([1e-6, 1.0, 1e4])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31), SIZES)
def test_rounded_weights_are_within_half_a_step(
    rows: int, groups: int, seed: int, size: float
) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, 32 * groups)).astype(np.float32)
    weight *= np.float32(size)
    weight[0] = 0
    for grid in (int8_rows(weight), int4_groups(weight)):
        assert np.isfinite(grid.values()).all()
        assert not grid.values()[0].any()
        steps = np.repeat(grid.scale, grid.group, 1)
        loosest = 0.51 if grid.bits == 8 else 4.0  # a narrowed range cuts its ends
        if size > 1e-3:  # below, scales are no normal float16 numbers
            assert (np.abs(grid.values() - weight) <= loosest * steps + 1e-6 * size).all()


@pytest.mark.parametrize("case", ["qwen3-moe", "deepseek-v3", "llama-dynamic"])
def test_what_the_graph_cannot_say_is_refused(tmp_path: Path, case: str) -> None:
    model = ours(reference(case))
    with pytest.raises(ConfigError, match="ONNX"):
        written(tmp_path, cast("Decoder", model))
    assert not (tmp_path / "out").exists()


def test_what_was_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    folder = bundle_of(tiny_decoder(), tmp_path / "bundle", GRIDS["int4"])
    with pytest.raises(ConfigError, match="grids already"):
        export(folder, "onnx", tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_maker_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "ab"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a.onnx"
    )
    with pytest.raises(FormatError, match="deepseek exported"):
        open_exported(tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="whole"):
        open_exported(tmp_path / "b.onnx")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_file_without_its_manifest_is_one_line(
    tmp_path: Path, name: str, share: float
) -> None:
    written(tmp_path, tiny_decoder())
    (tmp_path / "out" / "export.json").unlink()
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(FormatError, match=r"whole|exported") as caught:
        open_exported(tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True])
def test_a_real_decoder_chooses_the_same_64_tokens(
    tmp_path: Path, smollm2_folder: Path, optimize: bool
) -> None:
    model = hub.load(smollm2_folder, dtype="float32")
    assert isinstance(model, Decoder)
    assert model.tokenizer is not None
    export(smollm2_folder, "onnx", tmp_path / "out", optimize=optimize)
    reader = open_exported(tmp_path / "out", threads=2)
    ids = torch.tensor([model.tokenizer.encode("The capital of France is Paris, and")])
    with torch.inference_mode():
        expected = model(ids).logits.numpy()
        cache = model.new_cache(1, 128)
        logits = model(ids, cache=cache).logits.numpy()
        fed, state = reader.step(ids.numpy(), None)
        np.testing.assert_allclose(fed, expected, rtol=1e-4, atol=1e-3)
        for _ in range(64):
            token = logits[:, -1:].argmax(-1)
            assert np.array_equal(token, fed[:, -1:].argmax(-1))
            logits = model(torch.from_numpy(token), cache=cache).logits.numpy()
            fed, state = reader.step(token, state)
            np.testing.assert_allclose(fed, logits, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True])
def test_a_real_encoder_gives_the_same_vectors(
    tmp_path: Path, minilm_folder: Path, optimize: bool
) -> None:
    model = hub.load(minilm_folder, dtype="float32")
    assert isinstance(model, Encoder)
    export(minilm_folder, "onnx", tmp_path / "out", optimize=optimize)
    reader = open_exported(tmp_path / "out", threads=2)
    for lengths, sides in (([512], [False]), ([3, 60, 17], [False, True, False])):
        assert_same(reader, model, *padded(lengths, sides, 30000))
