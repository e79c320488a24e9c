"""Ranges of numbers that are seen a batch at a time: how far a static grid of them shall reach."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Observer = Literal["minmax", "percentile", "mse", "kl"]

_BINS = 2048
_SHARES = tuple(1 - step / 50 for step in range(45))
"""Shares of the largest magnitude that `mse` and `kl` try."""


class Magnitudes:
    """How often each magnitude was seen, row by row, in bins whose range doubles when it must."""

    def __init__(self, rows: int) -> None:
        """Begin with nothing seen.

        Args:
            rows: what has a range of its own: channels, or 1.
        """
        self.counts = torch.zeros(rows, _BINS, dtype=torch.float64)
        self.reach = torch.zeros(rows)
        """What the last bin ends at [rows]."""
        self.largest = torch.zeros(rows)

    def see(self, values: Tensor) -> None:
        """Count numbers [rows, n]."""
        sizes = values.detach().float().abs()
        self.largest = torch.maximum(self.largest, sizes.amax(1))
        self.reach = torch.where(self.reach > 0, self.reach, self.largest)
        while bool((is_short := self.reach < self.largest).any()):
            halved = self.counts.unflatten(1, (-1, 2)).sum(-1)
            doubled = torch.cat((halved, torch.zeros_like(halved)), 1)
            self.counts = torch.where(is_short[:, None], doubled, self.counts)
            self.reach = torch.where(is_short, 2 * self.reach, self.reach)
        places = (sizes / self.reach.clamp(min=1e-30)[:, None] * _BINS).long().clamp(max=_BINS - 1)
        self.counts.scatter_add_(1, places, torch.ones_like(sizes, dtype=torch.float64))

    def limits(self, observer: Observer, *, bits: int = 8, percentile: float = 99.99) -> Tensor:
        """Return the largest magnitude that a symmetric grid of each row shall hold [rows].

        Args:
            observer: `minmax` the largest seen; `percentile` what so many per cent do not exceed;
                `mse` the limit of the least squared error; `kl` that of the least divergence of
                what was seen from what the grid makes of it.
            bits: of a code.
            percentile: for that observer, in per cent.

        Source: `kl` as the calibration of TensorRT (Migacz, GTC 2017): bins beyond the limit are
        counted in its last bin, and each level's count is spread over those of its bins that hold
        any; deviation: the limits that are tried are 45 shares of the largest.
        """
        if observer == "minmax":
            return self.largest
        if observer == "percentile":
            seen = self.counts.cumsum(1) / self.counts.sum(1, keepdim=True).clamp(min=1)
            bins = (seen < percentile / 100).sum(1) + 1
            return torch.minimum(self.reach * bins / _BINS, self.largest)
        levels = (1 << (bits - 1)) - 1
        loss = self._squared_errors if observer == "mse" else self._divergences
        losses = torch.stack([loss(self.largest * share, levels) for share in _SHARES])
        return self.largest * torch.tensor(_SHARES)[losses.argmin(0)]

    def _middles(self) -> Tensor:
        return (torch.arange(_BINS) + 0.5) / _BINS * self.reach[:, None]

    def _squared_errors(self, limit: Tensor, levels: int) -> Tensor:
        middles, scale = self._middles(), limit.clamp(min=1e-30)[:, None] / levels
        rounded = (middles / scale).round().clamp(max=levels) * scale
        return ((rounded - middles).double().square() * self.counts).sum(1)

    def _divergences(self, limit: Tensor, levels: int) -> Tensor:
        inside = self._middles() <= limit[:, None]
        cut = torch.where(inside, self.counts, 0.0)
        last = inside.sum(1).clamp(min=1) - 1
        beyond = (self.counts - cut).sum(1)
        seen = cut.scatter_add(1, last[:, None], beyond[:, None])
        scale = limit.clamp(min=1e-30)[:, None] / levels
        level = (self._middles() / scale).round().long().clamp(max=levels)
        level = torch.where(inside, level, levels + 1)
        holds = torch.where(inside, (self.counts > 0).double(), 0.0)
        zeros = torch.zeros(len(cut), levels + 2, dtype=torch.float64)
        total, filled = (zeros.scatter_add(1, level, each) for each in (cut, holds))
        spread = (total / filled.clamp(min=1)).gather(1, level) * holds
        share = seen / seen.sum(1, keepdim=True).clamp(min=1)
        made = spread / spread.sum(1, keepdim=True).clamp(min=1e-30)
        terms = share * (share.clamp(min=1e-30).log() - made.clamp(min=1e-12).log())
        return torch.where(share > 0, terms, 0.0).sum(1)
