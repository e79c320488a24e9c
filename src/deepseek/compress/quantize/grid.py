"""The grid of a weight: which range its codes cover, and the nearest code of each number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.ops.quantized import QuantizedWeight, rotate, short_scale
from deepseek.ops.scheme import ROTATED

_SHRINKS = tuple(1 - step / 25 for step in range(13))
"""Shares of a group's own range that are tried."""
_TOGETHER = 1 << 15
"""Numbers that are fitted together, so that what is tried stays in the cache."""
_LEAST_SCALE = 2.0**-14
"""float16's least normal number."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a weight's codes look like."""

    bits: int
    """4 or 8."""
    group: int | None
    """Channels of one scale; None for a whole row."""
    symmetric: bool
    """The middle code stands for 0 in every group."""
    rotated: bool = False
    """Every 64 channels of a width that is a multiple of 64 are rotated before they get codes:
    eight bits in groups of a multiple of 64, or a row, alone."""

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def bottom(self) -> int:
        """The least code: symmetric codes of 8 bits leave out the one without a negative."""
        return 1 if self.symmetric and self.bits == 8 else 0

    @property
    def middle(self) -> int:
        """The code of 0 where it is symmetric."""
        return 1 << (self.bits - 1)

    def width_of(self, channels: int) -> int:
        """Return the channels of one scale in a row of `channels`.

        Raises:
            ConfigError: they are no whole number of groups.
        """
        width = self.group or channels
        if channels % width:
            must = f"a divisor of the {channels} channels of every weight that is not ignored"
            raise ConfigError(describe("group", "Grid", must, self.group))
        return width

    def rotates(self, channels: int) -> bool:
        """Whether weights of so many channels are rotated."""
        return self.rotated and channels % ROTATED == 0


@dataclasses.dataclass(frozen=True)
class Scales:
    """Where the codes of each group lie."""

    scale: Tensor
    """float32 [N, groups], `short_scale` numbers above 0."""
    zero: Tensor
    """float32 [N, groups], whole numbers: the code of 0."""


def nearest(weight: Tensor, grid: Grid, scales: Scales) -> QuantizedWeight:
    """Return a weight [N, K] with each number at its nearest code."""
    blocks = weight.float().unflatten(-1, (scales.scale.shape[1], -1))
    codes = _codes(blocks, grid, scales.scale[..., None], scales.zero[..., None])
    return as_weight(codes.flatten(-2), grid, scales)


def as_weight(codes: Tensor, grid: Grid, scales: Scales) -> QuantizedWeight:
    """Return codes [N, K] of any dtype with their scales."""
    zero = scales.zero.to(torch.uint8)
    is_rotated = grid.rotates(codes.shape[1])
    return QuantizedWeight(grid.bits, codes.to(torch.uint8), scales.scale, zero, is_rotated)


def fit(weight: Tensor, grid: Grid, gram: Tensor | None = None) -> Scales:
    """Return the range of each group that loses least: tried are shares of its own range, with the
    zero point on either side, and then the scale that fits the codes by least squares.

    Args:
        weight: [N, K].
        grid: what the codes look like.
        gram: inputs' products `x.T @ x` [K, K]: what is lost is then the squared error of the
            group's part of the output; None for the squared error of the weight.

    Raises:
        ConfigError: the width is no whole number of groups.

    Source: the search of a clipped range by layer output as AWQ (2306.00978), section 4.1; the
    least-squares step is ours.
    """
    width = grid.width_of(weight.shape[1])
    metric = None if gram is None else _metric(gram, width)
    parts = [
        _fit_rows(rows.float().unflatten(-1, (-1, width)), grid, metric)
        for rows in weight.split(max(1, _TOGETHER // weight.shape[1]))
    ]
    scale, zero = zip(*parts, strict=True)
    return Scales(torch.cat(scale), torch.cat(zero))


def own_range(weight: Tensor, grid: Grid) -> Scales:
    """Return the range of each group from its least to its largest number."""
    blocks = weight.float().unflatten(-1, (-1, grid.width_of(weight.shape[1])))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if grid.symmetric:
        return Scales(_usable(_reach(low, high, grid)), torch.full_like(low, grid.middle))
    scale = _usable((high - low) / grid.top)
    return Scales(scale, (-low / scale).round().clamp(0, grid.top))


def round_weight(weight: Tensor, grid: Grid, gram: Tensor | None = None) -> QuantizedWeight:
    """Return a weight at the nearest codes of the range that `fit` finds, rotated where the grid
    says so."""
    weight, gram = turned(weight, grid), None if gram is None else turned_gram(gram, grid)
    return nearest(weight, grid, fit(weight, grid, gram))


def turned(weight: Tensor, grid: Grid) -> Tensor:
    """Return a weight [N, K] as the grid's codes see it."""
    return rotate(weight.float()) if grid.rotates(weight.shape[1]) else weight


def turned_gram(gram: Tensor, grid: Grid) -> Tensor:
    """Return inputs' products [K, K] as the grid's codes see them."""
    return rotate(rotate(gram).T) if grid.rotates(len(gram)) else gram


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Return the squared error of the outputs over the sum of their squares.

    Args:
        weight: [N, K].
        rounded: in its place [N, K].
        gram: inputs' products `x.T @ x` [K, K].
    """
    change = rounded - weight
    total = ((weight @ gram) * weight).sum(dtype=torch.float64)
    return float(((change @ gram) * change).sum(dtype=torch.float64) / total.clamp(min=1e-30))


def _metric(gram: Tensor, width: int) -> Tensor:
    """Return the gram's blocks of each group [groups, width, width], or its diagonal [K / width,
    width] where a block would be large."""
    if width > 128:
        return gram.diagonal().unflatten(0, (-1, width))
    places = torch.arange(gram.shape[0]).unflatten(0, (-1, width))
    return gram[places[:, :, None], places[:, None, :]]


def _fit_rows(blocks: Tensor, grid: Grid, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scale and zero [N, groups] of blocks [N, groups, width]."""
    best = None
    for scale, zero in _candidates(blocks, grid):
        best = _better(best, _tried(blocks, grid, metric, scale, zero))
    assert best is not None
    for _ in range(2):
        _, _, zero, codes = best
        levels = codes - zero[..., None]
        squares = levels.square().sum(-1).clamp(min=1)
        refined = _usable((levels * blocks).sum(-1) / squares)
        best = _better(best, _tried(blocks, grid, metric, refined, zero))
    _, scale, zero, _ = best
    return scale, zero


_Fitted = tuple[Tensor, Tensor, Tensor, Tensor]
"""Error, scale, zero [N, groups] and codes [N, groups, width]."""


def _candidates(blocks: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if grid.symmetric:
        middle = torch.full_like(low, grid.middle)
        reach = _reach(low, high, grid)
        for share in _SHRINKS:
            yield _usable(reach * share), middle
        return
    for share in _SHRINKS:
        scale = _usable((high - low) * share / grid.top)
        exact = (-low * share / scale).clamp(0, grid.top)
        yield scale, exact.floor()
        yield scale, exact.ceil()


def _reach(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    return torch.maximum(high / (grid.top - grid.middle), -low / (grid.middle - grid.bottom))


def _usable(scale: Tensor) -> Tensor:
    return short_scale(scale.clamp(min=_LEAST_SCALE))


def _tried(
    blocks: Tensor, grid: Grid, metric: Tensor | None, scale: Tensor, zero: Tensor
) -> _Fitted:
    codes = _codes(blocks, grid, scale[..., None], zero[..., None])
    change = (codes - zero[..., None]) * scale[..., None] - blocks
    if metric is None:
        error = change.square().sum(-1)
    elif metric.dim() == 2:
        error = (change.square() * metric).sum(-1)
    else:
        product = torch.bmm(change.transpose(0, 1), metric).transpose(0, 1)
        error = (product * change).sum(-1)
    return error, scale, zero, codes


def _better(best: _Fitted | None, new: _Fitted) -> _Fitted:
    if best is None:
        return new
    is_better = new[0] < best[0]
    error, scale, zero = (torch.where(is_better, new[i], best[i]) for i in range(3))
    return error, scale, zero, torch.where(is_better[..., None], new[3], best[3])


def _codes(blocks: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
    return (blocks / scale).round_().add_(zero).clamp_(grid.bottom, grid.top)
