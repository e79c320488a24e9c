"""The order of samples as a function of their number: no state, no list, no worker in it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepseek.errors import ConfigError, describe

Integers = NDArray[np.int64]

SLOTS = 1024
"""Samples of a mixture in whose every block of this length the weights hold exactly."""
_ROUNDS = 4
_MASK = (1 << 64) - 1


def shuffled(places: Integers, size: int, seed: int) -> Integers:
    """Return where each place stands in a permutation of `size` things, without forming it.

    A balanced Feistel network over the next even power of two; what falls outside walks on
    along its cycle (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        places: from 0 to `size` - 1, of any shape.
        size: at least 1.
        seed: picks the permutation.
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    keys = [_mixed(seed + number) for number in range(1, _ROUNDS + 1)]
    found = _feistel(places.astype(np.uint64), half, keys)
    while (outside := found >= size).any():
        found[outside] = _feistel(found[outside], half, keys)
    return found.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: Sequence[int]) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_hashed(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


def _hashed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mixed(*numbers: int) -> int:
    """Return one seed out of several numbers."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _hashed(state + np.uint64((number * 0x9E3779B97F4A7C15 + 1) & _MASK))
    return int(state[0])


@dataclasses.dataclass(frozen=True)
class Places:
    """Where samples come from; three arrays of one shape."""

    source: Integers
    """Number of the source."""
    epoch: Integers
    """How often the source had been read through before."""
    window: Integers
    """Which of the source's windows."""


class SampleOrder:
    """Which window of which source is the n-th sample of a stage.

    It depends on the seed, sizes and weights alone: whoever asks, in whatever pieces and on however
    many workers, sees the same sequence, and where a stage stands is one number. A source gives
    each of its windows once before it gives any again.

    With weights, every 1024 samples in a row hold each source in its share, to the whole sample.
    Without, all windows of all sources are one pool and each comes once an epoch.
    """

    def __init__(
        self, sizes: Sequence[int], *, weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        """Make the order.

        Args:
            sizes: windows of each source, at least 1.
            weights: of each source, positive; None for one pool.
            seed: picks the order.

        Raises:
            ConfigError: a source is empty, or its weight is so small that it never comes.
        """
        if not sizes or min(sizes) < 1:
            must = "at least one source, each of at least one sample"
            raise ConfigError(describe("sizes", "SampleOrder", must, list(sizes)))
        self._sizes = np.asarray(sizes, np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))
        self._seed = seed
        self._slots = None if weights is None else _slots(weights, len(sizes))

    @property
    def epoch_samples(self) -> int | None:
        """Samples after which each window of the pool came once; None with weights."""
        return int(self._starts[-1]) if self._slots is None else None

    def places(self, first: int, count: int) -> Places:
        """Return where the samples `first`, `first` + 1, … come from, `count` of them."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        if self._slots is None:
            return self._from_pool(numbers)
        source, turn = self._turns(numbers)
        epoch = turn // self._sizes[source]
        window = np.empty_like(turn)
        for each, lap in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            chosen = (source == each) & (epoch == lap)
            size = int(self._sizes[each])
            window[chosen] = shuffled(turn[chosen] % size, size, _mixed(self._seed, each, lap))
        return Places(source, epoch, window)

    def _from_pool(self, numbers: Integers) -> Places:
        total = int(self._starts[-1])
        epoch = numbers // total
        pooled = np.empty_like(numbers)
        for lap in np.unique(epoch).tolist():
            chosen = epoch == lap
            pooled[chosen] = shuffled(numbers[chosen] % total, total, _mixed(self._seed, lap))
        source = np.searchsorted(self._starts, pooled, side="right") - 1
        return Places(source, epoch, pooled - self._starts[source])

    def _turns(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Return each sample's source, and how many samples that source gave before."""
        assert self._slots is not None
        counts = np.bincount(self._slots, minlength=len(self._sizes))
        source, turn = np.empty_like(numbers), np.empty_like(numbers)
        block = numbers // SLOTS
        for each in np.unique(block).tolist():
            chosen = block == each
            order, before = self._block(each)
            slot = numbers[chosen] % SLOTS
            source[chosen] = order[slot]
            turn[chosen] = each * counts[order[slot]] + before[slot]
        return source, turn

    @functools.lru_cache(maxsize=8)  # noqa: B019 (an order lives as long as its stage)
    def _block(self, number: int) -> tuple[Integers, Integers]:
        """Return the source of each slot of a block, and how often it stood before in the block."""
        assert self._slots is not None
        order = self._slots[shuffled(np.arange(SLOTS), SLOTS, _mixed(self._seed, -1, number))]
        before = np.empty_like(order)
        for each in range(len(self._sizes)):
            places = np.flatnonzero(order == each)
            before[places] = np.arange(len(places))
        return order, before


def _slots(weights: Sequence[float], num_sources: int) -> Integers:
    """Return which source each of the slots belongs to, by the largest remainders."""
    if len(weights) != num_sources or not all(math.isfinite(w) and w > 0 for w in weights):
        must = f"{num_sources} positive numbers, one a source"
        raise ConfigError(describe("weights", "SampleOrder", must, list(weights)))
    exact = np.asarray(weights, np.float64) / sum(weights) * SLOTS
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: SLOTS - int(counts.sum())]
    counts[rest] += 1
    if counts.min() < 1:
        must = f"at least 1/{SLOTS} of their sum, each"
        raise ConfigError(describe("weights", "SampleOrder", must, list(weights)))
    return np.repeat(np.arange(num_sources, dtype=np.int64), counts)
