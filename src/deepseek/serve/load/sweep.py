"""The loads of a sweep: from one user alone to all at once, and rates between the two."""

from __future__ import annotations

from deepseek.errors import ConfigError, describe
from deepseek.serve.load.arrivals import Load


def ends_of_sweep(num_requests: int) -> tuple[Load, Load]:
    """Return the two loads that a sweep begins with: one at a time, and all at once."""
    return Load(concurrency=1), Load(concurrency=max(2, num_requests))


def rates_between(slowest: float, fastest: float, count: int, burstiness: float) -> list[Load]:
    """Return loads at rates that lie evenly between two.

    Args:
        slowest: requests a second that one user alone has answered.
        fastest: requests a second that are answered when all come at once.
        count: how many rates.
        burstiness: of each, see `Load`.

    Raises:
        ConfigError: at one end nothing was answered.
    """
    if slowest <= 0 or fastest <= 0:
        must = "a server that answers some requests at both ends of the sweep"
        raise ConfigError(describe("URL", "bench serve", must, {"1": slowest, "all": fastest}))
    low, high = sorted((slowest, fastest))
    step = (high - low) / (count + 1)
    return [
        Load(rate=round(low + step * (place + 1), 4) or low, burstiness=burstiness)
        for place in range(count)
    ]
