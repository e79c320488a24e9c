"""What an answer must keep to be worth something: the bounds of `--goodput`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from deepseek.errors import ConfigError, describe
from deepseek.serve.load.outcome import Outcome

Objectives = Mapping[str, float]
"""Seconds that each quantity may be, by its short name."""

OBJECTIVES: dict[str, str] = {
    "ttft": "time to the first token",
    "itl": "95th percentile of the times between tokens of the answer",
    "stall": "longest time between two pieces of the answer",
    "tpot": "mean time between tokens of the answer",
    "e2e": "time to the end of the answer",
}
"""Quantities that can be bounded, by their short names."""


def read_objectives(words: Sequence[str]) -> dict[str, float]:
    """Return the bounds of words like `ttft:0.5`.

    Raises:
        ConfigError: a word is none.
    """
    found = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            bound = float(value)
        except ValueError:
            bound = math.nan
        if name not in OBJECTIVES or name in found or not bound > 0:
            must = f"NAME:SECONDS, each name once, of {', '.join(OBJECTIVES)}"
            raise ConfigError(describe("goodput", "bench serve", must, word))
        found[name] = bound
    return found


def meets(outcome: Outcome, objectives: Objectives) -> bool:
    """Return whether an answer came whole and within all bounds."""
    return outcome.is_answered and all(
        _observed(outcome, name) <= bound for name, bound in objectives.items()
    )


def _observed(outcome: Outcome, name: str) -> float:
    if name == "ttft":
        return outcome.first_token_s
    if name == "e2e":
        return outcome.end_to_end_s
    if name == "tpot":
        return outcome.time_per_output_token_s or 0.0
    gaps = outcome.gaps_s if name == "stall" else outcome.token_gaps_s
    if not gaps:
        return 0.0
    return max(gaps) if name == "stall" else percentile(sorted(gaps), 95)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return a percentile of sorted values, between two of them by a straight line.

    Args:
        ordered: at least one value, ascending.
        share: from 0 to 100.
    """
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
