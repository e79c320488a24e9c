"""What a step costs, learned while serving."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 15
"""Observations that a group of like steps remembers."""

MIN_OBSERVATIONS = 8


class CostModel:
    """Seconds of a step: a base, and so much for each of its tokens.

    Steps are grouped by their size, in powers of two. Of each group the median of the last few
    counts, so that single slow steps do not matter, and every group counts alike however long ago
    it was seen last, so that a long time of small steps does not unlearn what large ones cost. The
    line through the groups is fitted by least squares of relative errors.
    """

    def __init__(self) -> None:
        """Begin knowing nothing."""
        self._groups: dict[int, deque[tuple[int, float]]] = {}
        self._medians: dict[int, tuple[float, float]] = {}
        self._num_observed = 0
        self.base_s = 0.0
        self.token_s = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether steps of different sizes have been seen, and enough of them."""
        return self._num_observed >= MIN_OBSERVATIONS and len(self._medians) > 1

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step; a time that is not positive, as of a clock set back, is left out."""
        if num_tokens < 1 or not (math.isfinite(seconds) and seconds > 0):
            return
        size = num_tokens.bit_length()
        group = self._groups.setdefault(size, deque(maxlen=WINDOW))
        group.append((num_tokens, seconds))
        self._medians[size] = (
            statistics.median(tokens for tokens, _ in group),
            statistics.median(took_s for _, took_s in group),
        )
        self._num_observed += 1
        self.base_s, self.token_s = _fit_line(list(self._medians.values()))

    def seconds(self, num_tokens: int, num_steps: int = 1) -> float:
        """Return the seconds of so many steps that have so many tokens together."""
        return self.base_s * num_steps + self.token_s * num_tokens


class Average:
    """A mean in which what is newer counts more."""

    def __init__(self, weight: float) -> None:
        """Give each new value so much weight, between 0 and 1."""
        self._weight = weight
        self.value: float | None = None

    def observe(self, value: float) -> None:
        """Take in a value."""
        if self.value is None:
            self.value = value
        else:
            self.value += self._weight * (value - self.value)


def _fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return base and slope, neither negative, that come nearest to (x, y) in relative terms."""
    weights = [1 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    products = squares = 0.0
    for weight, (x, y) in zip(weights, points, strict=True):
        products += weight * (x - mean_x) * (y - mean_y)
        squares += weight * (x - mean_x) ** 2
    if squares == 0:
        return 0.0, mean_y / mean_x
    slope = max(products / squares, 0.0)
    base = mean_y - slope * mean_x
    if base >= 0:
        return base, slope
    ratio = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
    return 0.0, ratio / sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
