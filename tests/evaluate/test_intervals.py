"""Intervals have the coverage that they claim, shown by simulation with fixed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.evaluate.intervals import (
    block_length,
    block_sums,
    bootstrap_ratio,
    clustered_wilson,
    student_quantile,
    wilson,
)
from deepseek.records import Spread


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_equals_published_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    found = wilson(successes, trials)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (5, 2.5706),
        (10, 2.2281),
        (30, 2.0423),
        (1000, 1.9623),
    ],
)
def test_student_quantile_equals_the_table(degrees: int, quantile: float) -> None:
    assert student_quantile(degrees) == pytest.approx(quantile, rel=4e-3)


@given(st.integers(1, 400), st.integers(1, 60))
def test_blocks_hold_every_value_once(num_values: int, block: int) -> None:
    values = np.arange(num_values, dtype=np.float64)
    sums, sizes = block_sums(values, block)
    assert sums.sum() == values.sum()
    assert sizes.sum() == num_values
    assert num_values < block or all(block <= size < 2 * block for size in sizes)


def test_block_length_is_bounded() -> None:
    assert [block_length(n) for n in (10, 1024, 8192, 10**6)] == [16, 16, 128, 512]


def test_bootstrap_repeats_by_seed() -> None:
    sums, sizes = np.arange(20.0), np.full(20, 3.0)
    assert bootstrap_ratio(sums, sizes, seed=4) == bootstrap_ratio(sums, sizes, seed=4)
    assert bootstrap_ratio(sums, sizes, seed=4) != bootstrap_ratio(sums, sizes, seed=5)


def test_one_unit_has_no_interval() -> None:
    assert bootstrap_ratio(np.ones(1), np.ones(1)) is None
    assert clustered_wilson(np.ones(1), np.ones(1)) is None


def covers(found: Spread | None, truth: float) -> bool:
    """Return whether the truth lies inside an interval."""
    assert found is not None
    return found.low <= truth <= found.high


@pytest.mark.parametrize("num_units", [8, 32])
def test_bootstrap_covers_the_mean_of_skewed_documents(num_units: int) -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        sizes = generator.integers(50, 150, num_units).astype(np.float64)
        sums = sizes * generator.gamma(4.0, 0.75, num_units)
        hits += covers(bootstrap_ratio(sums, sizes, seed=trial), 3.0)
    assert 0.89 <= hits / 100 <= 0.99


def test_block_bootstrap_covers_the_mean_of_dependent_losses() -> None:
    generator = np.random.default_rng(1)
    hits = naive_hits = 0
    for trial in range(100):
        noise = generator.normal(size=2048)
        losses = np.empty(2048)
        losses[0] = noise[0]
        for index in range(1, 2048):
            losses[index] = 0.7 * losses[index - 1] + noise[index]
        hits += covers(bootstrap_ratio(*block_sums(losses, block_length(2048)), seed=trial), 0.0)
        half = 1.96 * losses.std() / math.sqrt(2048)
        naive_hits += abs(losses.mean()) <= half
    assert 0.90 <= hits / 100 <= 0.99
    assert naive_hits / 100 < 0.75


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_clustered_wilson_covers_where_plain_wilson_does_not(share: float) -> None:
    generator = np.random.default_rng(2)
    trials = np.full(16, 120.0)
    hits = naive_hits = 0
    for _ in range(400):
        chances = generator.beta(6 * share, 6 * (1 - share), 16)
        successes = generator.binomial(120, chances).astype(np.float64)
        hits += covers(clustered_wilson(successes, trials), share)
        naive_hits += covers(wilson(successes.sum(), trials.sum()), share)
    assert 0.90 <= hits / 400 <= 0.99
    assert naive_hits / 400 < 0.7


def test_clusters_that_all_agree_still_have_a_width() -> None:
    found = clustered_wilson(np.full(8, 120.0), np.full(8, 120.0))
    assert found is not None
    assert found.high == 1.0
    assert 0.5 < found.low < 0.7
