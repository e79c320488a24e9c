"""The layout of GPTQ checkpoints: weights on one grid of 4 or 8 bits, packed along the channels.
Loads no torch.

Source: AutoGPTQ's `QuantLinear` (`qweight`, `qzeros`, `scales`, `g_idx`). Its first version stores
zero points less one, so that a zero point of 0 has no code that every reader understands; such
weights are written in the second version, `gptq_v2`, which stores them as they are. A `g_idx` that
permutes channels (activation order) is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.hub.safetensors import TensorEntry
from deepseek.hub.stored_grid import StoredGrid, check_part, pack_rows, read_array, unpack_rows
from deepseek.ops.grid import OFFSET, Bytes, Floats, Grid

if TYPE_CHECKING:
    from torch import Tensor

    from deepseek.ops.quantized import QuantizedWeight

METHOD = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_V2 = "gptq_v2"


@dataclasses.dataclass(frozen=True, eq=False)
class GptqGrid(StoredGrid):
    """A weight in this layout."""

    zero_offset: int = 1
    """What was taken from the zero points before they were stored."""

    def read_codes(self) -> Bytes:
        """Return the codes, uint8 [N, K]."""
        return unpack_rows(self.array("qweight").T, self.bits, self.shape[1])

    def read_scales(self) -> tuple[Floats, Bytes]:
        """Return the scales, float32 [N, groups], and the zero points, uint8 [N, groups]."""
        scale = np.ascontiguousarray(self.finite(self.array("scales"), "scales").T)
        stored = unpack_rows(self.array("qzeros"), self.bits, self.shape[0]).T
        zero = (stored + np.uint8(self.zero_offset)) & np.uint8(2**self.bits - 1)
        return scale, np.ascontiguousarray(zero)


def to_gptq(weight: QuantizedWeight, *, zero_offset: int = 1) -> dict[str, Tensor]:
    """Return the tensors of a weight by the layout's names: qweight int32 [K * bits / 32, N],
    qzeros int32 [groups, N * bits / 32], scales float16 [groups, N], g_idx int32 [K].

    Args:
        weight: N and K are multiples of `32 / bits`.
        zero_offset: 1 for the first version, whose zero points are at least 1; 0 for `gptq_v2`.

    Raises:
        ConfigError: the sizes or zero points are not ones that the layout has.
    """
    import torch

    arrays = write_grid(weight.grid(), zero_offset)
    return {part: torch.from_numpy(array) for part, array in arrays.items()}


def from_gptq(tensors: Mapping[str, Tensor], bits: int, *, zero_offset: int = 1) -> QuantizedWeight:
    """Return the weight that `to_gptq` or another program wrote.

    Args:
        tensors: by the layout's names; without `g_idx` the groups are taken to be in order.
        bits: 4 or 8.
        zero_offset: as in `to_gptq`.

    Raises:
        FormatError: shapes that do not fit one another, or channels in another order.
    """
    import torch

    from deepseek.ops.quantized import QuantizedWeight

    words, zeros, scales = (tensors[part] for part in PARTS[:3])
    width, (groups, rows) = len(words) * (32 // bits), scales.shape
    fits = words.shape[1] == rows and groups > 0 and width % groups == 0
    if not fits or zeros.shape != (groups, rows * bits // 32):
        shapes = [list(tensors[part].shape) for part in PARTS[:3]]
        must = "[K / per word, N], [groups, N / per word] and [groups, N]"
        raise FormatError(describe("qweight, qzeros and scales", "a GPTQ weight", must, shapes))
    if "g_idx" in tensors:
        _check_order(tensors["g_idx"].numpy(), width // groups, "g_idx")
    codes = unpack_rows(words.numpy().T, bits, width)
    zero = (unpack_rows(zeros.numpy(), bits, rows).T + np.uint8(zero_offset)) & (2**bits - 1)
    return QuantizedWeight(
        bits,
        torch.from_numpy(codes),
        scales.T.float().contiguous(),
        torch.from_numpy(np.ascontiguousarray(zero)),
    )


def write_grid(grid: Grid, zero_offset: int) -> dict[str, npt.NDArray[np.generic]]:
    """Return the tensors of a weight; see `to_gptq`.

    Raises:
        ConfigError: the sizes or zero points are not ones that the layout has, or it is rotated or
            has static inputs.
    """
    rows, width = grid.codes.shape
    per_word = 32 // grid.bits
    if grid.is_rotated:
        step = "Quantize it with rotate: false"
        raise ConfigError(describe("weight", "the GPTQ layout", "not rotated", "rotated", step))
    if grid.input_scale is not None:
        must, step = "without static inputs", "Write compressed-tensors"
        raise ConfigError(describe("weight", "the GPTQ layout", must, grid.input_scale, step))
    if rows % per_word or width % per_word:
        must = f"of sizes that are multiples of {per_word}"
        raise ConfigError(describe("weight", "the GPTQ layout", must, [rows, width]))
    if (grid.zero < zero_offset).any():
        must = "at least 1 in its first version"
        raise ConfigError(describe("zero point", "the GPTQ layout", must, 0, f"Write {_V2}"))
    zero = np.ascontiguousarray(grid.zero.T) - np.uint8(zero_offset)
    return {
        "qweight": np.ascontiguousarray(pack_rows(grid.codes, grid.bits).T),
        "qzeros": pack_rows(zero, grid.bits),
        "scales": np.ascontiguousarray(grid.scale.T.astype(np.float16)),
        "g_idx": (np.arange(width) // grid.group).astype(np.int32),
    }


def write_weight(
    name: str, grid: Grid, zero_offset: int
) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """Yield the tensors that stand for a weight of a model."""
    module = name.removesuffix("weight")
    for part, array in write_grid(grid, zero_offset).items():
        yield module + part, array


def offset_for(grids: Mapping[str, Grid]) -> int:
    """Return what is taken from the zero points of a model: 1, or 0 where one of them is 0."""
    return int(all((grid.zero > 0).all() for grid in grids.values()))


def write_config(grids: Mapping[str, Grid], zero_offset: int) -> dict[str, Any]:
    """Return the `quantization_config` of a model.

    Raises:
        ConfigError: an embedding is among the weights, or they do not all have one grid: the layout
            has neither.
    """
    kinds = {(grid.bits, _group_size(grid)) for grid in grids.values()}
    embedding = next((name for name in grids if "embed" in name.rpartition(".")[0]), None)
    if embedding is not None:
        step = "Leave it out, or use the layout compressed-tensors"
        raise ConfigError(describe("quantized", "the GPTQ layout", "linear", embedding, step))
    if len(kinds) != 1:
        step = "Use the layout compressed-tensors"
        must = "of one number of bits and one group"
        raise ConfigError(describe("quantized", "the GPTQ layout", must, sorted(kinds), step))
    ((bits, group),) = kinds
    return {
        "quant_method": METHOD,
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": all(bool((grid.zero == OFFSET[bits]).all()) for grid in grids.values()),
        "lm_head": "lm_head.weight" in grids,
        "checkpoint_format": METHOD if zero_offset else _V2,
    }


def _group_size(grid: Grid) -> int:
    """Return the group as the layout says it: -1 for one scale a row."""
    is_row = grid.group == grid.codes.shape[1] and grid.group not in (32, 64, 128)
    return -1 if is_row else grid.group


def read_grids(
    folder: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> dict[str, GptqGrid]:
    """Return the weights on a grid in a folder, by their names in a model.

    Args:
        folder: the model folder.
        config: the `quantization_config` of its `config.json`.
        entries: what `read_entries` gave.

    Raises:
        FormatError: settings that are not read here, or tensors that do not fit them.
    """
    bits, asked = config.get("bits"), config.get("group_size", -1)
    version = config.get("checkpoint_format", METHOD)
    if bits not in (4, 8) or type(asked) is not int or version not in (METHOD, _V2):
        must = "4 or 8 bits in groups, gptq or gptq_v2"
        raise FormatError(describe("content", "quantization_config", must, dict(config)))
    found = {}
    for name, entry in entries.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix("qweight")
        parts = {part: entries[module + part] for part in PARTS if module + part in entries}
        if len(entry.shape) != 2:
            raise FormatError(describe(name, entry.file, "a matrix", list(entry.shape)))
        width, rows = entry.shape[0] * 32 // bits, entry.shape[1]
        group = width if asked == -1 else asked
        if group < 1 or not width or width % group:
            must = f"-1 or a divisor of {width}"
            raise FormatError(describe("group_size", "quantization_config", must, asked))
        check_part(parts, "qweight", ("I32",), entry.shape)
        check_part(parts, "qzeros", ("I32",), (width // group, rows * bits // 32))
        check_part(parts, "scales", ("F16", "BF16", "F32"), (width // group, rows))
        if "g_idx" in parts:
            check_part(parts, "g_idx", ("I32",), (width,))
            _check_order(read_array(folder, parts["g_idx"]), group, module + "g_idx")
        offset = int(version == METHOD)
        found[module + "weight"] = GptqGrid(
            folder, parts, bits, (rows, width), group, zero_offset=offset
        )
    return found


def _check_order(g_idx: npt.NDArray[np.generic], group: int, name: str) -> None:
    if not np.array_equal(g_idx, np.arange(len(g_idx)) // group):
        step = "Quantize it without activation order"
        raise FormatError(describe(name, "a GPTQ weight", "in order", "other groups", step))
