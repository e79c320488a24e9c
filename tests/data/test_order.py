"""The order of samples: a permutation, an exact mixture, the same for whoever asks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.data import SampleOrder
from deepseek.data.order import SLOTS, Places, shuffled
from deepseek.errors import ConfigError

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def triples(places: Places) -> list[tuple[int, int, int]]:
    parts = (places.source.tolist(), places.epoch.tolist(), places.window.tolist())
    return list(zip(*parts, strict=True))


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_shuffled_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(shuffled(np.arange(size), size, seed).tolist()) == list(range(size))


def test_shuffled_needs_no_memory_for_its_size() -> None:
    far = shuffled(np.array([0, 10**15]), 2 * 10**15, 1)
    assert far.min() >= 0 and far.max() < 2 * 10**15


def test_shuffled_mixes() -> None:
    """Neighbours land far from each other, and seeds differ."""
    found = shuffled(np.arange(10_000), 10_000, 5)
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.05
    assert (np.abs(np.diff(found)) == 1).mean() < 0.01
    assert (found == shuffled(np.arange(10_000), 10_000, 6)).mean() < 0.01


@given(sizes=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_pool_gives_each_window_once_an_epoch(sizes: list[int], seed: int) -> None:
    order, total = SampleOrder(sizes, seed=seed), sum(sizes)
    assert order.epoch_samples == total
    found = triples(order.places(0, 3 * total))
    every = {(source, window) for source, size in enumerate(sizes) for window in range(size)}
    for epoch in range(3):
        part = found[epoch * total : (epoch + 1) * total]
        assert {(source, window) for source, _, window in part} == every
        assert {lap for _, lap, _ in part} == {epoch}


@given(sizes=SIZES, seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_mixture_holds_its_weights_and_repeats_nothing_early(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    shares = st.floats(0.1, 10)
    weights = data.draw(st.lists(shares, min_size=len(sizes), max_size=len(sizes)))
    order = SampleOrder(sizes, weights=weights, seed=seed)
    found = triples(order.places(0, 2 * SLOTS))
    for block in (found[:SLOTS], found[SLOTS:]):
        counts = Counter(source for source, _, _ in block)
        for source, weight in enumerate(weights):
            assert abs(counts[source] - SLOTS * weight / sum(weights)) < 1
    laps = Counter((source, epoch) for source, epoch, _ in found)
    for (source, epoch), count in laps.items():
        windows = {window for s, e, window in found if (s, e) == (source, epoch)}
        assert len(windows) == count <= sizes[source]
        if (source, epoch + 1) in laps:
            assert count == sizes[source], "an epoch ends before the next begins"


@given(
    weights=st.sampled_from([None, (1.0, 2.5)]),
    first=st.integers(0, 5000),
    cuts=st.lists(st.integers(1, 300), min_size=1, max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_pieces_are_the_whole(
    weights: tuple[float, ...] | None, first: int, cuts: list[int]
) -> None:
    order = SampleOrder([40, 1000], weights=weights, seed=3)
    whole = triples(order.places(first, sum(cuts)))
    pieces, place = [], first
    for count in cuts:
        pieces += triples(SampleOrder([40, 1000], weights=weights, seed=3).places(place, count))
        place += count
    assert pieces == whole


@pytest.mark.parametrize(
    "sizes,weights",
    [([], None), ([0], None), ([5, 5], [1.0]), ([5, 5], [1.0, 0.0]), ([5, 5], [1.0, 1e-9])],
)
def test_bad_orders_say_what_is_wrong(sizes: list[int], weights: list[float] | None) -> None:
    with pytest.raises(ConfigError, match="SampleOrder"):
        SampleOrder(sizes, weights=weights)
