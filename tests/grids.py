"""Weights rounded to grids of integers, as tests of storage and of the engine need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepseek.ops.quantized import QuantizedWeight, rotate, short_scale

Kind = (
    tuple[int, int | None, bool]
    | tuple[int, int | None, bool, bool]
    | tuple[int, int | None, bool, bool, float]
)
"""Bits, group (None for a row), whether it is symmetric, whether it is rotated, and the scale of
its inputs where that is static."""


def rounded(
    weight: Tensor, bits: int, group: int, *, symmetric: bool, rotated: bool = False
) -> QuantizedWeight:
    """Return a weight [N, K] rounded to the nearest code of its group's range."""
    weight = weight.detach().float()
    blocks = (rotate(weight) if rotated else weight).unflatten(-1, (-1, group))
    most = 2**bits - 1
    if symmetric:
        scale = short_scale(blocks.abs().amax(-1) / (most // 2))
        zero = torch.full_like(scale, 1 << (bits - 1))
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scale = short_scale((high - low) / most)
        zero = torch.where(scale > 0, -low / scale, 0).round().clamp(0, most)
    levels = torch.where(scale[..., None] > 0, blocks / scale[..., None], 0)
    codes = (levels + zero[..., None]).round().clamp(0, most).flatten(-2)
    return QuantizedWeight(bits, codes.to(torch.uint8), scale, zero.to(torch.uint8), rotated)


def put_on_grids(model: nn.Module, kinds: Mapping[str, Kind]) -> dict[str, QuantizedWeight]:
    """Round the matrices of a model in place and return what they are rounded to.

    Args:
        model: its first matching entry decides about each matrix.
        kinds: part of a name, and what becomes of it.
    """
    found = {}
    for name, parameter in model.named_parameters():
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        if kind is None or parameter.dim() != 2:
            continue
        bits, group, symmetric, rotated, scale = (*kind, *(False, None)[len(kind) - 3 :])
        width = parameter.shape[1]
        weight = rounded(parameter, bits, group or width, symmetric=symmetric, rotated=rotated)
        found[name] = dataclasses.replace(weight, input_scale=scale)
        parameter.data.copy_(found[name].values())
    return found


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    """Raise unless two weights have the same codes, scales, zero points and inputs."""
    for name in ("bits", "is_rotated", "input_scale"):
        assert getattr(one, name) == getattr(other, name), name
    for part in ("codes", "scale", "zero"):
        assert torch.equal(getattr(one, part), getattr(other, part)), part
