"""How long prompts and answers are."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal, get_args

from deepseek.errors import ConfigError, describe

Vary = Literal["fixed", "uniform", "exponential"]
"""`fixed`: all alike; `uniform`: from half the mean to one and a half of it; `exponential`: most
are short and a few are long, up to four times the mean. The mean is the same for all three, but for
rounding."""

VARIES: tuple[str, ...] = get_args(Vary)
_LONGEST = 4.0
_UNCUT = 1.02
"""The mean before lengths are cut at four, for a mean of one behind it."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of whole numbers of at least 1.

    Raises:
        ConfigError: a mean below 1, or an unknown kind.
    """

    mean: int
    vary: Vary = "fixed"

    def __post_init__(self) -> None:
        """Check both."""
        if self.mean < 1:
            raise ConfigError(describe("mean", "Lengths", "at least 1", self.mean))
        if self.vary not in VARIES:
            must = f"one of {', '.join(VARIES)}"
            raise ConfigError(describe("vary", "Lengths", must, self.vary))

    @property
    def longest(self) -> int:
        """The largest number that can come."""
        shares = {"fixed": 1.0, "uniform": 1.5, "exponential": _LONGEST}
        return int(self.mean * shares[self.vary])

    def draw(self, generator: random.Random) -> int:
        """Return a length."""
        if self.vary == "fixed":
            return self.mean
        if self.vary == "uniform":
            # symmetric about the mean, so that it is the mean whatever the rounding
            reach = self.mean // 2
            return generator.randint(self.mean - reach, self.mean + reach)
        return min(max(1, round(generator.expovariate(1 / (_UNCUT * self.mean)))), self.longest)
