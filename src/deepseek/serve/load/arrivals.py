"""When requests come: so many at once, or so many a second whatever becomes of them."""

from __future__ import annotations

import dataclasses
import math
import random

from deepseek.errors import ConfigError, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """One of the two: a number of users who each wait for their answer before they ask again
    (closed loop), or requests that come at a rate (open loop).

    Raises:
        ConfigError: both or neither, or a number that is none.
    """

    concurrency: int | None = None
    rate: float | None = None
    """Requests a second."""
    burstiness: float = 1.0
    """Of a rate: 1 for a Poisson process, below 1 for bursts, large for even distances; the shape
    of the gamma distribution of the distances."""

    def __post_init__(self) -> None:
        """Check that it can be made."""
        if (self.concurrency is None) == (self.rate is None):
            got = {"concurrency": self.concurrency, "rate": self.rate}
            raise ConfigError(describe("load", "Load", "a concurrency or a rate", got))
        for name in ("concurrency", "rate", "burstiness"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(describe(name, "Load", "a number above 0", value))

    @property
    def value(self) -> float:
        """The number of users, or the rate."""
        return self.concurrency if self.concurrency is not None else self.rate or 0.0

    @property
    def name(self) -> str:
        """What a person calls it."""
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        bursts = "" if self.burstiness == 1 else f", burstiness {self.burstiness:g}"
        return f"{self.rate:g}/s{bursts}"

    def conditions(self) -> dict[str, float]:
        """Return what a measurement says of it."""
        if self.concurrency is not None:
            return {"concurrency": self.concurrency}
        return {"rate": self.rate or 0.0, "burstiness": self.burstiness}


def arrival_times(load: Load, count: int, seed: int) -> list[float]:
    """Return seconds from the start at which requests come, the first at 0; all 0 in a closed
    loop, where they come as others end."""
    if load.rate is None:
        return [0.0] * count
    generator = random.Random(f"{seed}/arrivals/{load.rate}/{load.burstiness}")
    scale = 1 / (load.rate * load.burstiness)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += generator.gammavariate(load.burstiness, scale)
    return times
