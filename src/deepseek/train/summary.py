"""What a run's `metrics.jsonl` tells, as measurements and as curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek.records import Measurement, summarize
from deepseek.train.places import Places


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, one a step, in order."""
    path = Places(folder).metrics
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarize_run(folder: Path) -> list[Measurement]:
    """Return each stage's last loss (the mean of its last tenth), speed and share of the peak."""
    found: list[Measurement] = []
    for stage, steps in by_stage(read_metrics(folder)).items():
        conditions = {"stage": stage, "steps": len(steps)}
        last = [step["loss"] for step in steps[-max(1, len(steps) // 10) :]]
        found.append(
            Measurement(
                name="training_loss",
                value=sum(last) / len(last),
                unit="nats",
                conditions=conditions,
            )
        )
        for name, unit in (("tokens_per_s", "tokens/s"), ("mfu", "1")):
            values = [step[name] for step in steps]
            found.append(summarize(name, values, unit, conditions=conditions))
    return found


def by_stage(metrics: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of each stage, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in metrics:
        found.setdefault(line["stage"], []).append(line)
    return found
