"""The proof sees what was not read exactly once, and what was not what it should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deepseek.data import Document, Windows, write_corpus
from deepseek.errors import ConfigError
from deepseek.train.ledger import Ledger, next_attempt, prove

BATCH, STEPS = 4, 6


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    tokens = Document(list(range(1, 60)))
    corpus = write_corpus(
        tmp_path / "corpus", [tokens], name="toy", vocab_size=60, tokenizer_sha256="x"
    )
    return Windows([corpus], length=3, seed=2)


def write(
    folder: Path, windows: Windows, *, attempt: int, start: int, stop: int, workers: int
) -> None:
    """Write what workers would that do the steps from `start` up to `stop`."""
    for rank in range(workers):
        ledger = Ledger(folder, attempt=attempt, start=start, rank=rank, size=workers)
        share = BATCH // workers
        for step in range(start, stop):
            first = step * BATCH + rank * share
            ledger.add(0, step, first, windows.read(first, share).tokens)
        ledger.close()


def problems(folder: Path, windows: Windows, num_steps: int = STEPS) -> tuple[str, ...]:
    (stage,), _ = prove(folder, [("toy", windows, BATCH)], [num_steps])
    return stage.problems


def test_kills_and_changes_of_workers_are_fine(tmp_path: Path, windows: Windows) -> None:
    folder = tmp_path / "ledger"
    write(folder, windows, attempt=0, start=0, stop=3, workers=1)
    assert next_attempt(folder) == 1
    write(folder, windows, attempt=1, start=2, stop=5, workers=4)
    write(folder, windows, attempt=2, start=4, stop=6, workers=2)
    with next(folder.glob("attempt-0001*rank-3*")).open("a") as file:
        file.write('{"stage": 0, "st')
    assert problems(folder, windows) == ()
    (stage,), workers = prove(folder, [("toy", windows, BATCH)], [STEPS])
    assert workers == [1, 4, 2] and stage.num_samples == BATCH * STEPS


def drop_a_worker(folder: Path, windows: Windows) -> None:
    next(folder.glob("*rank-1.jsonl")).unlink()


def repeat_a_sample(folder: Path, windows: Windows) -> None:
    path = next(folder.glob("*rank-1.jsonl"))
    path.write_text(path.read_text().replace('"first": 6', '"first": 5'))


def skip_a_step(folder: Path, windows: Windows) -> None:
    for path in folder.glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"step": 2,' not in line))


def read_other_tokens(folder: Path, windows: Windows) -> None:
    ledger = Ledger(folder, attempt=1, start=5, rank=0, size=1)
    ledger.add(0, 5, 5 * BATCH, np.zeros((BATCH, 3), np.int64))
    ledger.close()


def begin_too_late(folder: Path, windows: Windows) -> None:
    write(folder, windows, attempt=1, start=3, stop=4, workers=1)


@pytest.mark.parametrize(
    "fault,words",
    [
        (drop_a_worker, "ends before"),
        (repeat_a_sample, "comes again"),
        (skip_a_step, "step 2: ends before"),
        (read_other_tokens, "held other tokens"),
        (begin_too_late, "step 4: ends before"),
    ],
)
def test_planted_faults_are_seen(
    fault: Callable[[Path, Windows], None], words: str, tmp_path: Path, windows: Windows
) -> None:
    folder = tmp_path / "ledger"
    write(folder, windows, attempt=0, start=0, stop=STEPS, workers=2)
    assert problems(folder, windows) == ()
    fault(folder, windows)
    assert any(words in line for line in problems(folder, windows))


def test_no_ledger_is_said(tmp_path: Path, windows: Windows) -> None:
    with pytest.raises(ConfigError, match="ledger"):
        problems(tmp_path / "ledger", windows)
