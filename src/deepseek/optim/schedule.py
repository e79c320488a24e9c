"""Learning rates as functions of the step: nothing to save, nothing to go out of step on resume."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from deepseek.config import Config
from deepseek.errors import ConfigError, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Config):
    """The same rate in every step, after a linear rise."""

    kind: Literal["constant"] = "constant"
    warmup_steps: int = 0
    """Steps of the rise from nothing."""

    def factor(self, step: int, num_steps: int) -> float:
        """Return what the rate is multiplied by in a step, counted from 0."""
        return _rise(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Config):
    """A linear rise, then half a cosine down; with warm restarts, again and again.

    Source: Loshchilov and Hutter, "SGDR" (1608.03983), equation 5: T_0 is `cycle_steps`, T_mult is
    `cycle_growth`, eta_min is `floor` times the rate. Deviation: the rise before the first cycle.
    """

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = 0
    """Steps of the rise from nothing."""
    floor: float = 0.1
    """Share of the rate that a cycle ends at."""
    cycle_steps: int | None = None
    """Steps of the first cycle; None for one cycle that ends with the stage."""
    cycle_growth: float = 1.0
    """How much longer each cycle is than the one before."""

    def __post_init__(self) -> None:
        _check_share("floor", self.floor, "Cosine")
        if self.cycle_steps is not None and self.cycle_steps < 1:
            raise ConfigError(describe("cycle_steps", "Cosine", "at least 1", self.cycle_steps))
        if self.cycle_growth < 1:
            raise ConfigError(describe("cycle_growth", "Cosine", "at least 1", self.cycle_growth))

    def factor(self, step: int, num_steps: int) -> float:
        """Return what the rate is multiplied by in a step, counted from 0."""
        if step < self.warmup_steps:
            return _rise(step, self.warmup_steps)
        place = step - self.warmup_steps
        length: float = self.cycle_steps or max(1, num_steps - self.warmup_steps)
        while self.cycle_steps is not None and place >= length:
            place -= length
            length *= self.cycle_growth
        share = min(1.0, place / length)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * share)) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Config):
    """A linear rise, a plateau, and a linear fall at the end.

    Source: Hu et al., "MiniCPM" (2404.06395), section 4. Deviation: the fall is linear, as in
    Hägele et al. (2405.18392).
    """

    kind: Literal["warmup-stable-decay"] = "warmup-stable-decay"
    warmup_steps: int = 0
    """Steps of the rise from nothing."""
    decay: float = 0.2
    """Share of the stage's steps that the fall takes."""
    floor: float = 0.0
    """Share of the rate that it ends at."""

    def __post_init__(self) -> None:
        _check_share("decay", self.decay, "WarmupStableDecay")
        _check_share("floor", self.floor, "WarmupStableDecay")

    def factor(self, step: int, num_steps: int) -> float:
        """Return what the rate is multiplied by in a step, counted from 0."""
        fall = self.decay * num_steps
        left = num_steps - step
        if fall > 0 and left < fall:
            return self.floor + (1 - self.floor) * left / fall
        return _rise(step, self.warmup_steps)


ScheduleConfig = Constant | Cosine | WarmupStableDecay


def _rise(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _check_share(name: str, value: float, owner: str) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(describe(name, owner, "from 0 to 1", value))
