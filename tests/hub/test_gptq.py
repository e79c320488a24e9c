"""The GPTQ layout against its definition, code by code; folders of it, whole and tampered with."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.hub import Bundle, Quantized, from_gptq, to_gptq
from deepseek.ops.quantized import QuantizedWeight, short_scale
from tests.grids import assert_same, put_on_grids
from tests.hub.tiny import tiny_decoder


def draw(bits: int, rows: int, groups: int, group: int, least: int, seed: int) -> QuantizedWeight:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups * group), generator=rng, dtype=torch.uint8)
    zero = torch.randint(least, 2**bits, (rows, groups), generator=rng, dtype=torch.uint8)
    return QuantizedWeight(bits, codes, short_scale(torch.rand(rows, groups, generator=rng)), zero)


def plain_values(tensors: dict[str, torch.Tensor], bits: int, offset: int) -> np.ndarray:
    """Return the numbers as the layout defines them: (code - (stored zero + offset)) * scale."""
    words, zeros = (tensors[part].numpy().view(np.uint32) for part in ("qweight", "qzeros"))
    scales, g_idx = tensors["scales"].float().numpy(), tensors["g_idx"].numpy()
    per_word, mask = 32 // bits, 2**bits - 1
    values = np.empty((words.shape[1], len(g_idx)), np.float32)
    for k, group in enumerate(g_idx):
        for n in range(words.shape[1]):
            code = int(words[k // per_word, n]) >> bits * (k % per_word) & mask
            stored = int(zeros[group, n // per_word]) >> bits * (n % per_word) & mask
            values[n, k] = (code - (stored + offset)) * scales[group, n]
    return values


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    eights=st.integers(1, 4),
    groups=st.integers(1, 3),
    group=st.sampled_from([8, 32, 64]),
    offset=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**16),
)
def test_the_layout_says_the_same_numbers(
    bits: int, eights: int, groups: int, group: int, offset: int, seed: int
) -> None:
    weight = draw(bits, 8 * eights, groups, group, offset, seed)
    tensors = to_gptq(weight, zero_offset=offset)
    assert np.array_equal(plain_values(tensors, bits, offset), weight.values().numpy())
    assert_same(from_gptq(tensors, bits, zero_offset=offset), weight)


def test_what_the_layout_has_not_is_refused() -> None:
    weight = draw(4, 8, 1, 32, 1, 0)
    with pytest.raises(ConfigError, match="multiples of 8"):
        to_gptq(draw(4, 7, 1, 32, 1, 0))
    with pytest.raises(ConfigError, match="zero point"):
        to_gptq(QuantizedWeight(4, weight.codes, weight.scale, torch.zeros_like(weight.zero)))
    with pytest.raises(ConfigError, match="rotate: false"):
        to_gptq(dataclasses.replace(draw(8, 8, 2, 64, 1, 0), is_rotated=True))
    tensors = to_gptq(weight)
    with pytest.raises(FormatError, match="in order"):
        from_gptq({**tensors, "g_idx": torch.arange(32, dtype=torch.int32) % 2}, 4)
    with pytest.raises(FormatError, match="qweight"):
        from_gptq({**tensors, "qzeros": tensors["qzeros"][:, :0]}, 4)


def saved(folder: Path, bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    model = tiny_decoder()
    weights = put_on_grids(model, {"proj": (bits, group, symmetric)})
    hub.save(model, folder, quantized=Quantized(weights=weights, layout="gptq"))
    loaded = hub.load(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    return dict(weights)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32)])
def test_folders_come_back_exactly(tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    weights = saved(tmp_path, bits, group, symmetric)
    found = hub.quantized_weights(Bundle.open(tmp_path))
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert_same(found[name], weight)
    config = Bundle.open(tmp_path).config["quantization_config"]
    assert isinstance(config, dict)
    assert config["checkpoint_format"] == "gptq"
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group, symmetric)


def test_a_zero_point_of_zero_is_written_in_the_second_version(tmp_path: Path) -> None:
    model = tiny_decoder()
    parameter = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    parameter.data.abs_()
    weights = put_on_grids(model, {"proj": (4, 32, False)})
    hub.save(model, tmp_path, quantized=Quantized(weights=weights, layout="gptq"))
    config = Bundle.open(tmp_path).config["quantization_config"]
    assert isinstance(config, dict)
    assert config["checkpoint_format"] == "gptq_v2"
    for name, weight in hub.quantized_weights(Bundle.open(tmp_path)).items():
        assert_same(weight, weights[name])


NAME = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Any], dict[str, Any]], None]
FAULTS: dict[str, Change] = {
    "bits": lambda config, header: config.update(bits=3),
    "other bits": lambda config, header: config.update(bits=8),
    "group": lambda config, header: config.update(group_size=24),
    "no group": lambda config, header: config.update(group_size=0),
    "format": lambda config, header: config.update(checkpoint_format="marlin"),
    "no zeros": lambda config, header: header.update({"x": header.pop(f"{NAME}.qzeros")}),
    "no scales": lambda config, header: header.update({"x": header.pop(f"{NAME}.scales")}),
    "no codes": lambda config, header: header.update({"x": header.pop(f"{NAME}.qweight")}),
    "type": lambda config, header: header[f"{NAME}.qweight"].update(dtype="F32"),
    "order": lambda config, header: header[f"{NAME}.g_idx"].update(
        data_offsets=header[f"{NAME}.g_idx"]["data_offsets"], dtype="F32"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_was_tampered_with_is_one_error(tmp_path: Path, fault: str) -> None:
    saved(tmp_path, 4, 32, False)
    (tmp_path / "bundle.json").unlink()
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    config = json.loads((tmp_path / "config.json").read_text())
    FAULTS[fault](config["quantization_config"], header)
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(FormatError):
        hub.load(tmp_path)


def test_channels_in_another_order_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 4, 32, False)
    bundle = Bundle.open(tmp_path)
    (tmp_path / "bundle.json").unlink()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(bundle.tensors[f"{NAME}.g_idx"].offset)
        file.write(struct.pack("<i", 1))
    with pytest.raises(FormatError, match="in order"):
        hub.load(tmp_path)
