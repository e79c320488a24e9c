"""Bundles of weights on grids: written, read back exactly, and by the libraries whose layouts they
are."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.hub import Bundle, Quantized
from deepseek.hub.compressed_tensors import grid_settings, write_config, write_grid
from deepseek.hub.quantized import shortest
from deepseek.hub.stored_grid import pack_rows, unpack_rows
from deepseek.models.families import config_to_hf
from deepseek.ops.quantized import QuantizedWeight
from tests.grids import Kind, assert_same, put_on_grids, rounded
from tests.hub.tiny import tiny_decoder, tiny_tokenizer
from tests.models.zoo import ours, reference

ALL = {"": (4, 32, False)}
MIXED = {
    "embed": (8, None, True),
    "lm_head": (8, 64, True),
    "down": (8, None, True),
    "o_proj": (4, 64, True),
    "layers.0.self_attn": (8, 32, False),
    "": (4, 32, False),
}
ROTATED: dict[str, Kind] = {
    "o_proj": (4, 64, True),
    "q_proj": (8, None, True),
    "down": (8, 32, True),
    "": (8, 64, True, True),
}
STATIC: dict[str, Kind] = {
    "embed": (8, None, True),
    "o_proj": (4, 64, True, False, 2**-7),
    "q_proj": (8, None, True, False, 2**-6),
    "down": (8, 32, True),
    "": (8, 64, True, True, 2**-5),
}
LINEAR = {name: kind for name, kind in MIXED.items() if name not in ("embed", "lm_head")}


def saved(folder: Path, kinds: Mapping[str, Kind], **changes: Any) -> Bundle:
    model = tiny_decoder(**changes)
    layout = changes.pop("layout", "compressed-tensors")
    weights = put_on_grids(model, kinds)
    return hub.save(model, folder, quantized=Quantized(weights=weights, layout=layout))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kinds", [ALL, MIXED, LINEAR, ROTATED, STATIC])
def test_weights_come_back_exactly(tmp_path: Path, kinds: Mapping[str, Kind], tied: bool) -> None:
    model = tiny_decoder(tie_word_embeddings=tied)
    weights = put_on_grids(model, kinds)
    if kinds is LINEAR:
        weights = {name: each for name, each in weights.items() if "proj" in name}
    bundle = hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    found = hub.quantized_weights(Bundle.open(tmp_path))
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert_same(found[name], weight)
    loaded = hub.load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert hub.load(tmp_path, dtype="bfloat16").model.norm.weight.dtype is torch.bfloat16
    assert bundle.num_parameters == sum(each.numel() for each in model.parameters())


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 2, 7, 16, 32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_weight_is_packed_as_its_library_packs_it(
    bits: int, rows: int, groups: int, group: int, symmetric: bool, seed: int
) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    generator = torch.Generator().manual_seed(seed)
    weight = rounded(
        torch.randn(rows, groups * group, generator=generator), bits, group, symmetric=symmetric
    )
    tensors = {
        name.removeprefix("m."): torch.from_numpy(array)
        for name, array in write_grid("m.weight", weight.grid())
    }
    config = write_config({"m.weight": grid_settings("m.weight", weight.grid())}, [])
    theirs = quantization.QuantizationConfig.model_validate(config)
    (scheme,) = theirs.config_groups.values()
    kind = base.BaseCompressor.get_value_from_registry(scheme.format)
    wide = dict(tensors, weight_scale=tensors["weight_scale"].float())
    assert torch.equal(kind.decompress(wide, scheme)["weight"], weight.values())
    half = 1 << (bits - 1)
    zero = (weight.zero.int() - half).to(torch.int8)
    given = {"weight": weight.values(), "weight_scale": weight.scale, "weight_zero_point": zero}
    if (weight.scale > 0).all():
        packed = kind.compress(given, scheme)
        for name, tensor in tensors.items():
            if name != "weight_scale":
                assert torch.equal(packed[name].to(tensor.dtype), tensor), name
        assert set(packed) == set(tensors)


@pytest.mark.parametrize("kinds", [ALL, MIXED, LINEAR, ROTATED, STATIC])
def test_the_config_is_what_its_library_writes(tmp_path: Path, kinds: Mapping[str, Kind]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = dict(saved(tmp_path, kinds).config["quantization_config"])
    for beside in ("version", "sparsity_config"):
        config.pop(beside)
    transforms = config.pop("transform_config")
    dumped = quantization.QuantizationConfig.model_validate(config).model_dump(mode="json")
    assert dumped == config
    if kinds in (ROTATED, STATIC):
        transform = pytest.importorskip("compressed_tensors.transform")
        found = transform.TransformConfig.model_validate(transforms).model_dump(mode="json")
        assert found == transforms
    else:
        assert transforms == {}


def test_rotated_weights_are_those_of_their_library(tmp_path: Path) -> None:
    """With the transforms that the config names, its modules compute what the model does."""
    transform = pytest.importorskip("compressed_tensors.transform")
    from transformers import AutoModelForCausalLM

    weights = {
        name: each
        for name, each in hub.quantized_weights(saved(tmp_path / "a", ROTATED)).items()
        if each.is_rotated
    }
    model = hub.load(tmp_path / "a")
    hub.save(model, tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for name, weight in weights.items():  # as a file holds them: the online transforms are to come
        theirs.get_parameter(name).data.copy_(weight.numbers())
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    scheme = transform.TransformConfig.model_validate(config["transform_config"])
    for group in scheme.config_groups.values():
        group.apply = [each for each in group.apply if each.is_online()]
    transform.apply_transform_config(theirs, scheme)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        expected, found = model(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_word_of_codes() -> None:
    codes = np.arange(18, dtype=np.uint8).reshape(2, 9) % 16
    words = pack_rows(codes, 4)
    assert words.shape == (2, 2)
    for row in range(2):
        for place in range(9):
            assert int(words[row, place // 8]) >> 4 * (place % 8) & 15 == codes[row, place]
    assert np.array_equal(unpack_rows(words, 4, 9), codes)
    assert np.array_equal(unpack_rows(pack_rows(codes, 8), 8, 9), codes)


def test_nothing_is_float_that_need_not_be(tmp_path: Path) -> None:
    """The file holds what `num_bytes` counts, norms, and a little about each tensor."""
    model = tiny_decoder(hidden_size=256, intermediate_size=512, vocab_size=2048)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.copy_(parameter.data.half())
    weights = put_on_grids(model, ALL)
    hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    size = (tmp_path / "model.safetensors").stat().st_size
    counted = sum(weight.num_bytes for weight in weights.values()) + 2 * 5 * 256
    assert counted <= size <= counted + 500 * len(weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_shortest_dtype_that_holds_the_numbers(dtype: torch.dtype) -> None:
    value = torch.tensor([1.0, 1.0 + torch.finfo(dtype).eps])
    assert shortest(value).dtype is dtype
    assert torch.equal(shortest(value).float(), value)


def test_how_keys_and_values_are_cached_is_on_the_card(tmp_path: Path) -> None:
    model = tiny_decoder()
    hub.save(model, tmp_path, quantized=Quantized(weights={}, kv="int8"))
    bundle = Bundle.open(tmp_path)
    assert bundle.kv == "int8"
    assert "quantization_config" not in bundle.config
    assert hub.load(tmp_path).kv == "int8"
    card = json.loads((tmp_path / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps({**card, "kv": "int3"}))
    with pytest.raises(FormatError, match="int3"):
        hub.load(tmp_path)


def test_a_model_that_was_quantized_is_saved_as_numbers(tmp_path: Path) -> None:
    saved(tmp_path / "a", ALL)
    model = hub.load(tmp_path / "a")
    hub.save(model, tmp_path / "b")
    plain = Bundle.open(tmp_path / "b")
    assert not plain.grids
    for name, value in hub.load(tmp_path / "b").state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_experts_are_stored_one_by_one(tmp_path: Path) -> None:
    model = ours(reference("qwen3-moe"))
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    experts = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    weight = rounded(experts[1], 8, experts.shape[2], symmetric=True)
    experts.data[1] = weight.values()
    hub.save(model, tmp_path, quantized=Quantized(weights={name: weight}))
    assert_same(hub.quantized_weights(Bundle.open(tmp_path))[name], weight)
    loaded = hub.load(tmp_path).get_parameter("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(loaded, experts)


def test_a_quantized_folder_is_pulled(tmp_path: Path) -> None:
    bundle = saved(tmp_path / "a", MIXED)
    pulled = hub.pull(tmp_path / "a", to=tmp_path / "toy")
    assert set(pulled.grids) == set(bundle.grids)


@pytest.mark.parametrize("case", ["name", "shape", "gptq embedding", "gptq mixed", "gptq static"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    model, layout = tiny_decoder(), "compressed-tensors"
    weights = put_on_grids(model, ALL if case == "gptq embedding" else LINEAR)
    if case == "name":
        weights["model.other.weight"] = weights.popitem()[1]
    elif case == "shape":
        name = "model.layers.0.mlp.down_proj.weight"
        weights[name] = rounded(torch.ones(3, 64), 4, 32, symmetric=True)
    else:
        layout = "gptq"
        if case == "gptq mixed":
            weights = {name: each for name, each in weights.items() if "embed" not in name}
        elif case == "gptq static":
            weights = put_on_grids(model, {"up_proj": (4, 32, True, False, 0.01)})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="static" if case == "gptq static" else None):
        hub.save(model, tmp_path / "b", quantized=Quantized(weights=weights, layout=layout))
    assert sorted(tmp_path.iterdir()) == before


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the config and the header of a folder's weights; its card is thrown away."""
    (folder / "bundle.json").unlink()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, config = (
        json.loads(data[8 : 8 + length]),
        json.loads((folder / "config.json").read_text()),
    )
    change(config["quantization_config"], header)
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


EMBED = "model.embed_tokens.weight"


def group_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


def a_transform(place: str = "input", **changes: Any) -> dict[str, Any]:
    apply = [
        {"targets": ["Linear"], "location": where, "inverse": False, "ignore": []}
        for where in (place, f"weight_{place}")
    ]
    scheme = {"type": "hadamard", "apply": apply, "randomize": False, "head_dim": 64}
    return {"config_groups": {"R": {**scheme, **changes}}}


FAULTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "method": lambda config, header: config.update(quant_method="awq"),
    "no groups": lambda config, header: config.update(config_groups={}),
    "groups are a list": lambda config, header: config.update(config_groups=[1]),
    "no targets": lambda config, header: config["config_groups"]["group_0"].pop("targets"),
    "other targets": lambda config, header: config["config_groups"]["group_0"].update(
        targets=["re:nothing"]
    ),
    "bad pattern": lambda config, header: config["config_groups"]["group_0"].update(
        targets=["re:("]
    ),
    "three bits": lambda config, header: group_of(config).update(num_bits=3),
    "eight bits": lambda config, header: group_of(config).update(num_bits=8),
    "float": lambda config, header: group_of(config).update(type="float"),
    "block": lambda config, header: group_of(config).update(strategy="block"),
    "group": lambda config, header: group_of(config).update(group_size=24),
    "group of true": lambda config, header: group_of(config).update(group_size=True),
    "another group": lambda config, header: group_of(config).update(group_size=64),
    "symmetric": lambda config, header: group_of(config).update(symmetric=True),
    "transform": lambda config, header: config.update(transform_config={"R1": {}}),
    "another transform": lambda config, header: config.update(
        transform_config=a_transform(type="matrix")
    ),
    "another size": lambda config, header: config.update(transform_config=a_transform(head_dim=32)),
    "random signs": lambda config, header: config.update(
        transform_config=a_transform(randomize=True)
    ),
    "an output": lambda config, header: config.update(transform_config=a_transform("output")),
    "half of it": lambda config, header: config.update(
        transform_config=a_transform("input", apply=[])
    ),
    "four bits turned": lambda config, header: config.update(transform_config=a_transform()),
    "no scale": lambda config, header: header.update({"other": header.pop(f"{EMBED}_scale")}),
    "no shape": lambda config, header: header.update({"other": header.pop(f"{EMBED}_shape")}),
    "no zeros": lambda config, header: header.update({"other": header.pop(f"{EMBED}_zero_point")}),
    "type of scales": lambda config, header: header[f"{EMBED}_scale"].update(dtype="I16"),
    "type of codes": lambda config, header: header[f"{EMBED}_packed"].update(dtype="U32"),
    "turned codes": lambda config, header: header[f"{EMBED}_packed"].update(
        shape=header[f"{EMBED}_packed"]["shape"][::-1]
    ),
    "turned scales": lambda config, header: header[f"{EMBED}_scale"].update(
        shape=header[f"{EMBED}_scale"]["shape"][::-1]
    ),
    "left over": lambda config, header: header.update(
        {"model.norm.weight_scale": header.pop("model.norm.weight")}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_was_tampered_with_is_one_error(tmp_path: Path, fault: str) -> None:
    saved(tmp_path, ALL)
    rewrite(tmp_path, FAULTS[fault])
    with pytest.raises(FormatError):
        hub.load(tmp_path)


O_PROJ = "model.layers.0.self_attn.o_proj"


def inputs_of(config: dict[str, Any]) -> dict[str, Any]:
    group = next(group for group in config["config_groups"].values() if O_PROJ in group["targets"])
    return group["input_activations"]


STATIC_FAULTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "dynamic": lambda config, header: inputs_of(config).update(dynamic=True),
    "four bits": lambda config, header: inputs_of(config).update(num_bits=4),
    "by token": lambda config, header: inputs_of(config).update(strategy="token"),
    "asymmetric": lambda config, header: inputs_of(config).update(symmetric=False),
    "no scale": lambda config, header: header.update(
        {"other": header.pop(f"{O_PROJ}.input_scale")}
    ),
    "type": lambda config, header: header[f"{O_PROJ}.input_scale"].update(dtype="I32"),
    "shape": lambda config, header: header[f"{O_PROJ}.input_scale"].update(shape=[1, 1]),
}


@pytest.mark.parametrize("fault", STATIC_FAULTS)
def test_static_inputs_that_were_tampered_with_are_one_error(tmp_path: Path, fault: str) -> None:
    saved(tmp_path, STATIC)
    rewrite(tmp_path, STATIC_FAULTS[fault])
    with pytest.raises(FormatError):
        hub.load(tmp_path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_of_inputs_that_is_none_is_refused(tmp_path: Path, value: float) -> None:
    bundle = saved(tmp_path, STATIC)
    place = bundle.tensors[f"{O_PROJ}.input_scale"].offset
    (tmp_path / "bundle.json").unlink()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<f", value))
    with pytest.raises(FormatError, match="input_scale"):
        hub.load(tmp_path)


@pytest.mark.parametrize("sizes", [(0, 64), (96, 10**9), (-1, 64), (96, 63), (95, 64)])
def test_a_shape_that_lies_is_refused(tmp_path: Path, sizes: tuple[int, int]) -> None:
    bundle = saved(tmp_path, ALL)
    place = bundle.tensors[f"{EMBED}_shape"].offset
    (tmp_path / "bundle.json").unlink()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<qq", *sizes))
    with pytest.raises(FormatError):
        hub.load(tmp_path)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    bundle = saved(tmp_path, ALL)
    place = bundle.tensors[f"{EMBED}_scale"].offset
    (tmp_path / "bundle.json").unlink()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(b"\x00\x7c")
    with pytest.raises(FormatError, match="finite"):
        hub.load(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_is_one_error(tmp_path: Path, share: float) -> None:
    saved(tmp_path, MIXED)
    path = tmp_path / "model.safetensors"
    for has_card in (True, False):
        if not has_card:
            (tmp_path / "bundle.json").unlink()
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(FormatError):
            hub.load(tmp_path)


def test_settings_by_pattern_and_by_class_are_found(tmp_path: Path) -> None:
    """As other programs write them: a pattern goes before the class, a name or pattern first."""
    bundle = saved(tmp_path, LINEAR)
    weights = hub.quantized_weights(bundle)

    def change(config: dict[str, Any], header: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            group["targets"] = [
                target if target == "Linear" else f"re:.*{target.removeprefix('model.')}$"
                for target in group["targets"]
            ]

    rewrite(tmp_path, change)
    found = hub.quantized_weights(Bundle.open(tmp_path))
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert_same(found[name], weight)


def transformers_logits(folder: Path, ids: torch.Tensor, **settings_: Any) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **settings_
    )
    for module in theirs.modules():  # what is declared of inputs is not what is compared
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    with torch.inference_mode():
        return theirs(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_symmetric_linear_weights_on_any_grids(
    tmp_path: Path, tied: bool
) -> None:
    model = tiny_decoder(tie_word_embeddings=tied)
    kinds = {name: (bits, group, True) for name, (bits, group, _) in LINEAR.items()}
    weights = put_on_grids(model, kinds)
    weights = {name: each for name, each in weights.items() if "proj" in name}
    hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    ids = torch.randint(0, 96, (2, 40))
    with torch.inference_mode():
        expected = hub.load(tmp_path)(ids).logits
    found = transformers_logits(tmp_path, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_an_embedding_of_the_one_grid(
    tmp_path: Path, tied: bool, symmetric: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    saved(tmp_path, {"": (4, 32, symmetric)}, tie_word_embeddings=tied)
    ids = torch.randint(0, 96, (2, 40))
    with torch.inference_mode():
        expected = hub.load(tmp_path)(ids).logits
    asked = transformers.CompressedTensorsConfig(dequantize=True)
    found = transformers_logits(tmp_path, ids, quantization_config=asked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_saved_does_not_change_the_model(tmp_path: Path) -> None:
    model = tiny_decoder()
    weights = put_on_grids(model, MIXED)
    before = copy.deepcopy(weights)
    model.tokenizer = tiny_tokenizer()
    hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    for name, weight in weights.items():
        assert isinstance(weight, QuantizedWeight)
        assert_same(weight, before[name])
    assert "quantization_config" not in config_to_hf(model.config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["linear", "all"])
def test_transformers_reads_smollm2(tmp_path: Path, smollm2_folder: Path, case: str) -> None:
    """Linear weights as they are, int8 beside int4; everything in int4, the tied head included."""
    transformers = pytest.importorskip("transformers")
    model = hub.load(smollm2_folder, dtype="float32")
    kinds: Mapping[str, Kind] = {"": (4, 32, False)}
    if case == "linear":
        kinds = {"down": (8, None, True), "proj": (4, 32, True)}
    weights = put_on_grids(model, kinds)
    hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    ids = torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(0))
    asked = transformers.CompressedTensorsConfig(dequantize=True)
    settings_ = {"quantization_config": asked} if case == "all" else {}
    found = transformers_logits(tmp_path, ids, **settings_)
    with torch.inference_mode():
        expected = hub.load(tmp_path)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_static_inputs_are_those_of_their_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = tiny_decoder()
    kinds: dict[str, Kind] = {
        "down": (8, None, True, False, 0.02),
        "proj": (8, None, True, False, 0.04),
        "lm_head": (8, None, True, False, 0.1),
    }
    weights = put_on_grids(model, kinds)
    hub.save(model, tmp_path, quantized=Quantized(weights=weights))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in weights.items():
        module, scale = model.get_submodule(name.removesuffix(".weight")), weight.input_scale
        assert scale is not None
        module.register_forward_pre_hook(
            lambda _, given, scale=scale: ((given[0] / scale).round().clamp(-128, 127) * scale,)
        )
    ids = torch.randint(0, 96, (2, 40))
    with torch.inference_mode():
        expected, found = model(ids).logits, theirs(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
