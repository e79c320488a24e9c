"""What a step costs, learned from steps that are noisy, one-sided or wrong."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.serve.core.cost import Average, CostModel


def teach(cost: CostModel, sizes: list[int], noise: float = 0.0) -> None:
    """Show steps of 5 ms and half a millisecond a token."""
    rng = random.Random(0)
    for size in sizes:
        cost.observe(size, (0.005 + 0.0005 * size) * (1 + noise * rng.uniform(-1, 1)))


def test_line_is_found() -> None:
    cost = CostModel()
    teach(cost, [1, 1, 1, 16, 16, 16, 512, 512])
    assert cost.is_ready
    assert (cost.base_s, cost.token_s) == pytest.approx((0.005, 0.0005))
    assert cost.seconds(100, 2) == pytest.approx(0.06)


def test_noise_and_outliers_do_not_matter() -> None:
    cost = CostModel()
    for _ in range(20):
        teach(cost, [1, 4, 16, 64, 256], noise=0.2)
        cost.observe(1, 3.0)
        cost.observe(256, 1e-6)
        teach(cost, [1, 4, 16, 64, 256], noise=0.2)
    assert (cost.base_s, cost.token_s) == pytest.approx((0.005, 0.0005), rel=0.25)


def test_a_long_time_of_small_steps_does_not_unlearn_large_ones() -> None:
    cost = CostModel()
    teach(cost, [256] * 5)
    teach(cost, [1] * 10_000)
    assert cost.seconds(256) == pytest.approx(0.133, rel=0.01)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = CostModel()
    teach(cost, [1, 64] * 50)
    for size in [1, 64] * 15:
        cost.observe(size, 2 * (0.005 + 0.0005 * size))
    assert cost.seconds(64) == pytest.approx(2 * 0.037, rel=0.01)


def test_not_ready_before_steps_of_two_sizes_were_seen() -> None:
    cost = CostModel()
    assert not cost.is_ready
    teach(cost, [1] * 100)
    assert not cost.is_ready
    teach(cost, [8])
    assert cost.is_ready


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times_are_left_out(seconds: float) -> None:
    cost = CostModel()
    teach(cost, [1, 64] * 5)
    cost.observe(1, seconds)
    cost.observe(0, 1.0)
    assert (cost.base_s, cost.token_s) == pytest.approx((0.005, 0.0005))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-6, 1e3)), min_size=1, max_size=40))
def test_costs_are_never_negative(seen: list[tuple[int, float]]) -> None:
    cost = CostModel()
    for tokens, seconds in seen:
        cost.observe(tokens, seconds)
    assert cost.base_s >= 0
    assert cost.token_s >= 0
    assert 0 < cost.seconds(100, 1) < float("inf")


def test_average_begins_with_the_first_value() -> None:
    average = Average(0.5)
    assert average.value is None
    for value in (8.0, 4.0):
        average.observe(value)
    assert average.value == 6.0
