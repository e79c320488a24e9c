"""Rounding column by column, each column's error made up for by those behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.compress.quantize.grid import Grid, as_weight, fit, turned, turned_gram
from deepseek.ops.quantized import QuantizedWeight

_BLOCK = 128
"""Columns whose errors are passed on together to those behind them."""


class Compensated(NamedTuple):
    """What column-by-column rounding made of a weight."""

    weight: QuantizedWeight
    latent: Tensor
    """float32 [N, K]: each number as it was when its turn came, errors before it made up for; the
    codes are the nearest to it. Rotated where the weight is."""


def gptq(
    weight: Tensor, grid: Grid, gram: Tensor, *, damping: float = 0.01, by_size: bool = True
) -> Compensated:
    """Return a weight rounded so that its outputs change little.

    Source: Frantar et al., "GPTQ" (2210.17323), section 3: H = `gram`, damped; the upper Cholesky
    factor of its inverse gives each column's error and where it goes. Deviations: ranges are
    searched by `fit` with the gram and stay as the weight came (static groups), so that columns may
    be taken in any order without a stored index.

    Args:
        weight: float32 [N, K].
        grid: what the codes look like.
        gram: products of the inputs `x.T @ x` [K, K].
        damping: share of the mean diagonal that is added to it.
        by_size: columns of large inputs come first.
    """
    weight, gram = turned(weight, grid), turned_gram(gram, grid)
    scales = fit(weight, grid, gram)
    width = grid.width_of(weight.shape[1])
    order = gram.diagonal().argsort(descending=True) if by_size else torch.arange(len(gram))
    factor = _factor(gram[order][:, order], damping)
    work = weight.float()[:, order].T.contiguous()  # [K, N]: a column is one row of memory
    groups = order // width
    scale, zero = scales.scale.T[groups].contiguous(), scales.zero.T[groups].contiguous()
    codes, latent = torch.empty_like(work), torch.empty_like(work)
    for first in range(0, len(work), _BLOCK):
        last = min(first + _BLOCK, len(work))
        errors = torch.empty_like(work[first:last])
        for column in range(first, last):
            now, step, middle = work[column], scale[column], zero[column]
            code = (now / step).round_().add_(middle).clamp_(grid.bottom, grid.top)
            latent[column], codes[column] = now, code
            error = (now - (code - middle) * step) / factor[column, column]
            errors[column - first] = error
            behind = factor[column, column + 1 : last]
            work[column + 1 : last].addr_(behind, error, alpha=-1)
        work[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    back = order.argsort()
    made = as_weight(codes[back].T.contiguous(), grid, scales)
    return Compensated(made, latent[back].T.contiguous())


def _factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped gram's inverse. More damping is added where a
    gram of few samples is still not positive definite."""
    diagonal = gram.diagonal().mean().clamp(min=1e-20)
    eye = torch.eye(len(gram))
    while True:
        damped = gram + eye * (damping * diagonal)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping = max(damping, 1e-4) * 10
