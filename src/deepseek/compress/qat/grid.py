"""The grid that a weight begins with, and grids on the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from deepseek.compress.quantize import grid as codes
from deepseek.compress.quantize.grid import round_weight
from deepseek.config import Config
from deepseek.errors import ConfigError, FormatError, describe
from deepseek.ops.quantized import QuantizedWeight

_PARTS = ("bits", "codes", "scale", "zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Config):
    """How finely weights are rounded."""

    bits: Literal[4, 8] = 4
    group: int | None = 32
    """Input channels of one scale; None for a whole row."""
    is_symmetric: bool = False
    """Let the middle code stand for 0 in every group, in place of a zero point of its own."""

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise ConfigError(describe("group", "Grid", "at least 1", self.group))


def fitted(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Return a weight [N, K] rounded to a grid, in the ranges that lose least of it.

    Raises:
        ConfigError: its groups do not divide K.
    """
    return round_weight(weight, codes.Grid(grid.bits, grid.group, grid.is_symmetric))


def write_grids(path: Path, weights: Mapping[str, QuantizedWeight]) -> None:
    """Write weights on grids into a safetensors file, by name."""
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in weights.items():
        parts = (torch.tensor(weight.bits), weight.codes, weight.scale, weight.zero)
        tensors |= {f"{name}.{part}": value for part, value in zip(_PARTS, parts, strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, str(path))


def read_grids(path: Path) -> dict[str, QuantizedWeight]:
    """Return what `write_grids` wrote.

    Raises:
        FormatError: it is not there or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
        names = [name.removesuffix(".bits") for name in tensors if name.endswith(".bits")]
        found = {name: [tensors[f"{name}.{part}"] for part in _PARTS] for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        must = "weights on grids"
        raise FormatError(
            describe("grids", str(path), must, " ".join(str(error).split()))
        ) from error
    return {
        name: QuantizedWeight(bits=int(bits), codes=codes, scale=scale, zero=zero)
        for name, (bits, codes, scale, zero) in found.items()
    }
