"""The grid that a weight begins with, and grids on the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from deepseek.compress.qat.fake import quantize_on
from deepseek.config import Config
from deepseek.errors import ConfigError, FormatError, describe
from deepseek.ops.quantized import QuantizedWeight

_SHRINKS = tuple(1 - 0.025 * step for step in range(17))
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
    """Return a weight rounded to a grid: of 17 ranges for each group, from all that its weights
    span down to three fifths of it, the one with the least squared error.

    Args:
        weight: float32 [N, K].
        grid: how fine.

    Raises:
        ConfigError: its groups do not divide K.
    """
    rows, width = weight.shape
    group = grid.group or width
    if width % group:
        must = f"a divisor of the {width} input channels"
        raise ConfigError(describe("group", "Grid", must, group))
    best: QuantizedWeight | None = None
    least = torch.full((rows, width // group), float("inf"))
    for shrink in _SHRINKS:
        scale, zero = _range(weight.unflatten(-1, (-1, group)), grid, shrink)
        found = quantize_on(weight, scale, zero, grid.bits)
        error = (found.values() - weight).square().unflatten(-1, (-1, group)).sum(-1)
        best = found if best is None else _better(best, found, error < least)
        least = torch.minimum(error, least)
    assert best is not None
    return best


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


def _range(blocks: Tensor, grid: Grid, shrink: float) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of each group [N, groups] for a share of what it spans."""
    last = (1 << grid.bits) - 1
    if grid.is_symmetric:
        scale = blocks.abs().amax(-1) * (shrink / (last // 2))
        return scale, torch.full(scale.shape, last // 2 + 1, dtype=torch.uint8)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = ((high - low) * (shrink / last)).clamp(min=1e-30)
    zero = (-low * shrink / scale).round().clamp(0, last)
    return scale, zero.to(torch.uint8)


def _better(old: QuantizedWeight, new: QuantizedWeight, is_new: Tensor) -> QuantizedWeight:
    return QuantizedWeight(
        bits=old.bits,
        codes=torch.where(is_new.repeat_interleave(old.group, dim=1), new.codes, old.codes),
        scale=torch.where(is_new, new.scale, old.scale),
        zero=torch.where(is_new, new.zero, old.zero),
    )
