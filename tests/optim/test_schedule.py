"""Learning rates as functions of the step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.optim import Constant, Cosine, ScheduleConfig, WarmupStableDecay

SCHEDULES: list[ScheduleConfig] = [
    Constant(warmup_steps=5),
    Cosine(warmup_steps=5),
    Cosine(cycle_steps=7, cycle_growth=1.5),
    WarmupStableDecay(warmup_steps=5, decay=0.3),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(step=st.integers(0, 400), num_steps=st.integers(1, 300))
def test_a_factor_is_a_share(schedule: ScheduleConfig, step: int, num_steps: int) -> None:
    assert 0 <= schedule.factor(min(step, num_steps), num_steps) <= 1


@pytest.mark.parametrize("cycle,growth", [(10, 1), (10, 2), (7, 3)])
def test_warm_restarts_are_those_of_torch(cycle: int, growth: int) -> None:
    schedule = Cosine(cycle_steps=cycle, cycle_growth=growth, floor=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, cycle, growth, eta_min=0.2
    )
    for step in range(120):
        expected = optimizer.param_groups[0]["lr"]
        assert math.isclose(2.0 * schedule.factor(step, 1000), expected, rel_tol=1e-9)
        optimizer.step()
        theirs.step()


def test_one_cycle_ends_at_the_floor() -> None:
    schedule = Cosine(warmup_steps=4, floor=0.1)
    factors = [schedule.factor(step, 20) for step in range(21)]
    assert factors[4] == max(factors) == 1.0
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[20] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_a_plateau_between_rise_and_fall() -> None:
    factors = [WarmupStableDecay(warmup_steps=3, decay=0.2).factor(s, 20) for s in range(21)]
    assert factors[3:17] == [1.0] * 14
    assert factors[17:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_bad_schedules_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="floor of Cosine"):
        Cosine(floor=2.0)
    with pytest.raises(ConfigError, match="cycle_steps"):
        Cosine(cycle_steps=0)
    with pytest.raises(ConfigError, match="cycle_growth"):
        Cosine(cycle_growth=0.5)
    with pytest.raises(ConfigError, match="decay"):
        WarmupStableDecay(decay=-0.1)
