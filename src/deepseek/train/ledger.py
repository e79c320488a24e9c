"""What every worker read, written down as it happens, so that it can be proved afterwards.

Each start of a run is an attempt, and each worker of it writes `attempt-003-of-2-rank-1.jsonl`: for
every step the samples it took and a hash of their tokens. Steps that a later attempt does again,
because the run was killed between two checkpoints, count from that attempt only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek.data import Windows
from deepseek.errors import ConfigError, describe

_NAME = re.compile(r"attempt-(\d+)-from-(\d+)-of-(\d+)-rank-(\d+)\.jsonl")


class Ledger:
    """One worker's lines of one attempt."""

    def __init__(self, folder: Path, *, attempt: int, start: int, rank: int, size: int) -> None:
        """Open a new file.

        Args:
            folder: the run's.
            attempt: which start of the run this is.
            start: steps of the whole run that were done before.
            rank, size: the worker's, and how many there are.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"attempt-{attempt:04d}-from-{start}-of-{size}-rank-{rank}.jsonl"
        self._file = (folder / name).open("w", encoding="utf-8")

    def add(self, stage: int, step: int, first: int, tokens: NDArray[np.int64]) -> None:
        """Write what was read: samples `first` … of a stage, in a step of it."""
        line = {"stage": stage, "step": step, "first": first, "count": len(tokens)}
        self._file.write(json.dumps({**line, "sha256": _hash(tokens)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def next_attempt(folder: Path) -> int:
    """Return the number of the next attempt."""
    numbers = [int(match[1]) for match in map(_match, folder.glob("*.jsonl")) if match]
    return max(numbers, default=-1) + 1


@dataclasses.dataclass(frozen=True)
class StageProof:
    """What the ledger shows of a stage."""

    name: str
    num_steps: int
    num_samples: int
    problems: tuple[str, ...]
    """Empty where each sample was read exactly once an epoch, in the order of the stage."""


def prove(
    folder: Path, stages: Sequence[tuple[str, Windows, int]], step_counts: Sequence[int]
) -> tuple[list[StageProof], list[int]]:
    """Return what a run's ledger shows of each stage, and the workers of each attempt.

    Args:
        folder: of the ledger.
        stages: name, data and samples of a step.
        step_counts: steps of each stage that are claimed to be done.

    Raises:
        ConfigError: there is no ledger.
    """
    attempts = _read(folder)
    if not attempts:
        step = "Train first"
        raise ConfigError(describe("ledger", str(folder), "written by a run", "nothing", step))
    proofs, before = [], 0
    for number, ((name, windows, batch), num_steps) in enumerate(
        zip(stages, step_counts, strict=True)
    ):
        problems: list[str] = []
        for step in range(num_steps):
            lines = _counting(attempts, number, step, before + step)
            problems += _compare(lines, windows, step * batch, batch, f"step {step}")
        problems += _repeats(windows, num_steps * batch)
        proofs.append(StageProof(name, num_steps, num_steps * batch, tuple(problems[:20])))
        before += num_steps
    return proofs, [attempt.size for attempt in attempts]


@dataclasses.dataclass
class _Attempt:
    start: int
    size: int
    lines: dict[tuple[int, int], list[dict[str, object]]]


def _match(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name)


def _read(folder: Path) -> list[_Attempt]:
    found: dict[int, _Attempt] = {}
    for path in sorted(folder.glob("*.jsonl")):
        match = _match(path)
        if match is None:
            continue
        attempt = found.setdefault(int(match[1]), _Attempt(int(match[2]), int(match[3]), {}))
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                attempt.lines.setdefault((entry["stage"], entry["step"]), []).append(entry)
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the worker was killed
    return [found[number] for number in sorted(found)]


def _counting(
    attempts: Sequence[_Attempt], stage: int, step: int, total_step: int
) -> list[dict[str, object]]:
    """Return the lines of a step from the last attempt that did it."""
    for attempt in reversed(attempts):
        if attempt.start <= total_step:
            return attempt.lines.get((stage, step), [])
    return []


def _compare(
    lines: Sequence[dict[str, object]], windows: Windows, first: int, batch: int, what: str
) -> list[str]:
    expected, problems = first, []
    for line in sorted(lines, key=lambda each: int(str(each["first"]))):
        start, count = int(str(line["first"])), int(str(line["count"]))
        if start != expected:
            kind = "again" if start < expected else "after a gap"
            problems.append(f"{what}: sample {start} comes {kind}, {expected} was next")
        elif _hash(windows.read(start, count).tokens) != line["sha256"]:
            problems.append(f"{what}: samples {start} to {start + count - 1} held other tokens")
        expected = start + count
    if expected != first + batch:
        problems.append(f"{what}: ends before sample {expected}, not {first + batch}")
    return problems


def _repeats(windows: Windows, num_samples: int) -> list[str]:
    """Return what comes twice in an epoch of its source."""
    places = windows.order.places(0, num_samples)
    triples = zip(
        places.source.tolist(), places.epoch.tolist(), places.window.tolist(), strict=True
    )
    return [
        f"window {window} of source {source} comes {count} times in epoch {epoch}"
        for (source, epoch, window), count in Counter(triples).items()
        if count > 1
    ]


def _hash(tokens: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()
