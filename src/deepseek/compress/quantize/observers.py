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
    """How often each magnitude was seen, in bins whose range doubles when it must."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.reach = 0.0
        """What the last bin ends at."""
        self.largest = 0.0

    def see(self, values: Tensor) -> None:
        """Count numbers of any shape."""
        sizes = values.detach().float().abs().flatten()
        self.largest = max(self.largest, float(sizes.max()))
        self.reach = self.reach or self.largest
        while self.reach < self.largest:
            halved = self.counts.unflatten(0, (-1, 2)).sum(-1)
            self.counts = torch.cat((halved, torch.zeros_like(halved)))
            self.reach *= 2
        # without a range, histc takes that of the numbers
        self.counts += torch.histc(sizes, _BINS, 0, self.reach or 1.0)

    def limit(self, observer: Observer, *, bits: int = 8, percentile: float = 99.99) -> float:
        """Return the largest magnitude that a symmetric grid shall hold.

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
            seen = self.counts.cumsum(0) / self.counts.sum().clamp(min=1)
            bins = int((seen < percentile / 100).sum()) + 1
            return min(self.reach * bins / _BINS, self.largest)
        levels = (1 << (bits - 1)) - 1
        loss = self._squared_error if observer == "mse" else self._divergence
        return min((self.largest * share for share in _SHARES), key=lambda each: loss(each, levels))

    def relative_error(self, limit: float, *, bits: int = 8) -> float:
        """Return the squared error of a symmetric grid over the sum of squares; 0 for zeros."""
        squares = float((self._middles().square() * self.counts).sum())
        return self._squared_error(limit, (1 << (bits - 1)) - 1) / squares if squares else 0.0

    def _middles(self) -> Tensor:
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS * self.reach

    def _squared_error(self, limit: float, levels: int) -> float:
        middles, scale = self._middles(), max(limit, 1e-30) / levels
        rounded = (middles / scale).round().clamp(max=levels) * scale
        return float(((rounded - middles).square() * self.counts).sum())

    def _divergence(self, limit: float, levels: int) -> float:
        inside = self._middles() <= limit
        count = max(int(inside.sum()), 1)
        seen = self.counts[:count].clone()
        holds = (seen > 0).double()
        scale = max(limit, 1e-30) / levels
        level = (self._middles()[:count] / scale).round().long().clamp(max=levels)
        total, filled = (
            torch.zeros(levels + 1, dtype=torch.float64).index_add(0, level, each)
            for each in (seen, holds)
        )
        spread = (total / filled.clamp(min=1))[level] * holds
        seen[-1] += self.counts[count:].sum()
        share = seen / seen.sum().clamp(min=1)
        made = spread / spread.sum().clamp(min=1e-30)
        terms = share * (share.clamp(min=1e-30).log() - made.clamp(min=1e-12).log())
        return float(terms[share > 0].sum())
