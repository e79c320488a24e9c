"""Weights on a grid in the forward pass, with gradients that go straight through the rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.ops.quantized import QuantizedWeight, short_scale

_LEAST_SCALE = 2.0**-24
"""The smallest number of float16 above zero."""


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the numbers that stand for a weight on its grid, float32 [N, K]: those of
    `quantize_on`, to the bit.

    Source: Esser et al., "Learned step size quantization" (1902.08153), section 2: a weight's
    gradient goes straight through where it lies within the grid; a scale's is `round(w/s) - w/s`
    there and the last code's number outside, times `1 / sqrt(weights of the scale * last code)`.
    Deviations: a scale for every group, a zero point, and scales that are rounded to what files
    can hold, straight through too.

    Args:
        weight: float32 [N, K].
        scale: float32 [N, groups].
        zero: uint8 [N, groups], the code that stands for 0.
        bits: of a code.
    """
    numbers: Tensor = _FakeQuantize.apply(weight, scale, zero, bits)  # type: ignore[assignment]
    return numbers


def quantize_on(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> QuantizedWeight:
    """Return a weight rounded to the nearest numbers of a grid.

    Args:
        weight, scale, zero, bits: as `fake_quantize` takes them.
    """
    scale = stored_scale(scale)
    codes = _codes(_places(weight, scale, zero), bits).flatten(-2).to(torch.uint8)
    return QuantizedWeight(bits=bits, codes=codes, scale=scale, zero=zero)


def stored_scale(scale: Tensor) -> Tensor:
    """Return scales as they are stored: short, and above zero."""
    return short_scale(scale.clamp(min=_LEAST_SCALE))


def _places(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return where weights lie among the codes, not rounded [N, groups, group]."""
    blocks = weight.unflatten(-1, (scale.shape[1], -1))
    return blocks / scale[..., None] + zero[..., None].float()


def _codes(places: Tensor, bits: int) -> Tensor:
    return places.round().clamp_(0, (1 << bits) - 1)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.bits = bits
        scale = stored_scale(scale)
        codes = _codes(_places(weight, scale, zero), bits)
        return ((codes - zero[..., None].float()) * scale[..., None]).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, scale, zero = ctx.saved_tensors
        last = (1 << ctx.bits) - 1
        places = _places(weight, stored_scale(scale), zero)
        gradient = gradients[0].unflatten(-1, (scale.shape[1], -1))
        is_inside = (places > 0) & (places < last)
        to_scale = None
        if ctx.needs_input_grad[1]:
            codes = _codes(places, ctx.bits)
            slope = codes - torch.where(is_inside, places, zero[..., None].float())
            factor = (gradient.shape[-1] * (last // 2)) ** -0.5
            to_scale = (gradient * slope).sum(-1) * factor
        return (gradient * is_inside).flatten(-2), to_scale, None, None
