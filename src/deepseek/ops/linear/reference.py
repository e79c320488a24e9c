"""The specification of the linear product in every storage, in plain PyTorch.

What the compiled kernels compute, up to the order of float32 sums and the rounding of a level that
lies in the middle between two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.errors import ShapeError, describe
from deepseek.ops.grid import form_of
from deepseek.ops.quantized import QuantizedWeight, rotate
from deepseek.ops.scheme import ROTATED, Storage, scaled_together, stored_width

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


def linear_reference(
    inputs: Tensor,
    weight: Tensor,
    storage: Storage,
    *,
    group: int | None = 32,
    bias: Tensor | None = None,
) -> Tensor:
    """Return `inputs @ weight.T + bias` as computed with weights of a storage, float32 [M, N].

    Args:
        inputs: float32 [M, K].
        weight: float32 [N, K].
        storage: how the weight is stored, and with it how the inputs are.
        group: weights and inputs of one scale, integers only; int8 has at least 64, or None for a
            whole row.
        bias: float32 [N] or None.
    """
    if storage == "float32":
        return F.linear(inputs, weight, bias)
    if storage == "bfloat16":
        return F.linear(inputs.bfloat16().float(), weight.bfloat16().float(), bias)
    group = scaled_together(storage, group) or stored_width(storage, inputs.shape[-1], None)
    inputs, weight = _padded(inputs, group), _padded(weight, group)
    if storage == "int8":
        inputs = round_inputs(rotate(inputs), group)
        return F.linear(inputs, round_int8(rotate(weight), group), bias)
    return F.linear(round_inputs(inputs, group), round_int4(weight, group), bias)


def grid_linear_reference(
    inputs: Tensor, weight: QuantizedWeight, bias: Tensor | None = None
) -> Tensor:
    """Return `inputs @ weight.values().T + bias` as computed with a weight that keeps its grid,
    float32 [M, N]: inputs are int8 with a scale per row and group of `form_of`, or the weight's
    `input_scale`.

    Args:
        inputs: float32 [M, K].
        weight: [N, K], of a group that `form_of` has a form for.
        bias: float32 [N] or None.
    """
    rows, width = weight.codes.shape
    form = form_of(weight.grid())
    if form is None:
        must = "a multiple of 32 or a whole row"
        raise ShapeError(describe("group", f"a weight [{rows}, {width}]", must, weight.group))
    if weight.is_rotated:
        inputs = rotate(inputs)
    if weight.input_scale is None:
        group = form.group or width
        rounded = round_inputs(_padded(inputs, group), group)[..., :width]
    else:
        levels = (inputs / weight.input_scale).round().clamp(-127, 127)
        rounded = levels * weight.input_scale
    return F.linear(rounded, weight.numbers(), bias)


def round_inputs(states: Tensor, group: int) -> Tensor:
    """Return states as int8 with a scale per row and group holds them."""
    blocks = states.unflatten(-1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (_levels(blocks, scale).round() * scale).flatten(-2)


def round_int8(weight: Tensor, group: int = ROTATED) -> Tensor:
    """Return a weight [N, K] as int8 with a float16 scale per row and group holds it."""
    blocks = weight.unflatten(-1, (-1, group))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    return (_levels(blocks, scale).round().clamp(-127, 127) * scale).flatten(-2)


def round_int4(weight: Tensor, group: int) -> Tensor:
    """Return a weight [N, K] on 16 levels a group, of the range with the least squared error.

    Scale and least value are float16. The range is the group's own, or narrowed by up to 20 %.
    """
    levels, scale, least = int4_levels(weight, group)
    return (levels * scale + least).flatten(-2)


def int4_levels(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the levels of `round_int4`, 0 … 15 [N, K / group, group], and each group's scale and
    least value [N, K / group, 1]; all float32, the last two of them float16 numbers.
    """
    blocks = weight.unflatten(-1, (-1, group))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    best, best_scale, best_least = torch.zeros_like(blocks), torch.zeros_like(low), low
    best_error = torch.full_like(low, float("inf"))
    for shrink in _SHRINKS:
        least = ((high + low) / 2 - (high - low) / 2 * shrink).half().float()
        scale = ((high - low) * shrink / 15).half().float()
        levels = _levels(blocks - least, scale).round().clamp(0, 15)
        error = (levels * scale + least - blocks).square().sum(-1, keepdim=True)
        is_better = error < best_error
        best = torch.where(is_better, levels, best)
        best_scale = torch.where(is_better, scale, best_scale)
        best_least = torch.where(is_better, least, best_least)
        best_error = torch.minimum(error, best_error)
    return best, best_scale, best_least


def _levels(values: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, values / scale, torch.zeros_like(values))


def _padded(states: Tensor, multiple: int) -> Tensor:
    return F.pad(states, (0, -states.shape[-1] % multiple))
