"""What `verify` found, as measurements: the statistics that llama.cpp gives of two models."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek.evaluate.intervals import bootstrap_ratio, clustered_wilson
from deepseek.export.verifying.generator import coverage
from deepseek.records import Measurement

if TYPE_CHECKING:
    from deepseek.export.verifying.verifier import Verified

PERCENTILES = (50, 90, 95, 99, 99.9, 100)


def command(found: Verified, case: str | None = None) -> str:
    """Return the command line that repeats a run, or one case of it."""
    words = ["deepseek", "verify", found.source, found.exported]
    words += ["--cases", str(found.num_cases), "--seed", str(found.seed)]
    if found.tolerance.name != "float32":
        words += ["--tolerance", found.tolerance.name]
    if case is not None:
        words += ["--case", case]
    return shlex.join(words)


def measurements(found: Verified) -> list[Measurement]:
    """Return how far an export lies from its source; intervals are over cases.

    Source: llama.cpp, `llama-perplexity --kl-divergence`: mean, percentiles, agreement and the root
    mean square of the change of the likeliest token's chance.
    """
    conditions: dict[str, Any] = {
        "source": found.source,
        "exported": found.exported,
        "reader": found.reader,
        "seed": found.seed,
        "cases": len(found.outcomes),
        "positions": len(found.positions.difference),
        "longest": found.longest,
    }
    repeat = command(found)

    def one(name: str, value: float, unit: str, spread: Any = None, **rest: Any) -> Measurement:
        return Measurement(
            name=name,
            value=value,
            unit=unit,
            spread=spread,
            conditions={**conditions, **rest},
            command=repeat,
        )

    cases = [outcome.case for outcome in found.outcomes]
    made = [
        one("cases", len(cases), "1"),
        one("departed", len(found.departed), "1"),
        one("vocabulary_share", coverage(cases, found.vocab_size), "1"),
        one("seconds", found.seconds, "s"),
    ]
    positions = found.positions
    if not len(positions.difference):
        return made
    for rank in (50, 99, 100):
        value = float(np.percentile(positions.difference, rank, method="lower"))
        made.append(one("difference", value, "standard deviations", percentile=rank))
    made.append(one("absolute_difference", float(positions.absolute.max()), "1", percentile=100))
    if not len(positions.divergence):
        return made
    return made + _of_chances(found, one)


def _of_chances(found: Verified, one: Any) -> list[Measurement]:
    positions = found.positions
    _, cluster = np.unique(positions.case, return_inverse=True)
    sizes = np.bincount(cluster).astype(np.float64)
    sums = np.bincount(cluster, positions.divergence).astype(np.float64)
    agreed = np.bincount(cluster, positions.agreement).astype(np.float64)
    spread = bootstrap_ratio(sums, sizes) if np.isfinite(sums).all() else None
    made = [one("kl_divergence", float(positions.divergence.mean()), "nats/token", spread)]
    for rank in PERCENTILES:
        value = float(np.percentile(positions.divergence, rank, method="lower"))
        made.append(one("kl_divergence_percentile", value, "nats/token", percentile=rank))
    share = float(positions.agreement.mean())
    made.append(one("top1_agreement", share, "1", clustered_wilson(agreed, sizes)))
    root = float(np.sqrt(np.mean(positions.chance.astype(np.float64) ** 2)))
    made.append(one("chance_change", root, "1"))
    return made
