"""Preference tuning through TRL, from a bundle to a bundle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.train import Interrupted
from deepseek.train.preference import Preference, prefer, read_pairs
from tests.train.test_resume import weights

pytestmark = pytest.mark.slow


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Return pairs in which the shorter answer is preferred."""
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"{n} and 1?", "chosen": f" {n + 1}", "rejected": f" it is {n + 1}, I think"}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(start_folder: Path, pairs: Path, **changes: object) -> Preference:
    values = {"model": str(start_folder), "data": str(pairs), "steps": 12, "rate": 3e-3}
    values |= {"precision": "float32", "length": 64, "batch": 4}
    return Preference(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [4, None])
def test_what_is_preferred_becomes_likelier(
    start_folder: Path, pairs: Path, tmp_path: Path, rank: int | None
) -> None:
    pytest.importorskip("trl", reason="needs the extra `preference`")
    told: list[float] = []
    folder = prefer(
        asked(start_folder, pairs, rank=rank),
        tmp_path / "run",
        report=lambda words, share: told.append(share),
    )
    bundle = hub.Bundle.open(folder)
    found = {item.name: item.value for item in bundle.card.measurements}
    assert found["preference_accuracy"] == 1.0 and found["preference_margin"] > 0
    assert told == sorted(told) and told[-1] == 1.0
    assert bundle.card.stage is not None and bundle.card.stage.name == "preference"
    before, after = weights(start_folder), weights(folder)
    assert before.keys() == after.keys()
    assert any(not (before[name] == after[name]).all() for name in before)
    assert hub.load(folder).tokenizer is not None


def test_a_signal_is_a_checkpoint_and_the_run_goes_on(
    start_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl", reason="needs the extra `preference`")
    told: list[str] = []

    def stopping(words: str, share: float) -> None:
        told.append(words)
        if len(told) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    wanted = asked(start_folder, pairs)
    with pytest.raises(Interrupted):
        prefer(wanted, tmp_path / "run", report=stopping)
    prefer(wanted, tmp_path / "run", report=stopping)
    steps = [int(words.split()[1].partition("/")[0]) for words in told]
    assert steps == list(range(1, 13))
    with pytest.raises(ConfigError, match="run"):
        prefer(wanted.replace(beta=0.2), tmp_path / "run")


@pytest.mark.parametrize(
    "line", ['{"prompt": "a"}', '{"prompt": "a", "chosen": [], "rejected": "b"}', "[]"]
)
def test_a_bad_pair_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    with pytest.raises(FormatError, match="line 2"):
        read_pairs(path)


def test_mistakes_are_said(start_folder: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divisor"):
        asked(start_folder, pairs, batch=4, micro_batch=3)
    with pytest.raises(ConfigError, match="beta"):
        asked(start_folder, pairs, beta=0)
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(ConfigError, match="at least 4"):
        prefer(asked(start_folder, few), tmp_path / "run")
