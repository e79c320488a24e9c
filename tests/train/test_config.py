"""Runs from YAML and from Python, and what is wrong with those that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.errors import ConfigError, DeepseekError, FormatError
from deepseek.optim import AdamW, Muon, WarmupStableDecay
from deepseek.train import ExitLoss, Run, Source, Stage, read_run
from tests.house import REPO

GOOD = """
model: somewhere
stages:
  - name: one
    data: [{path: a.txt, weight: 2}, {path: b.txt, weight: 1}]
    steps: 3
    optimizer: {kind: muon, rate: 1e-3}
    schedule: {kind: warmup-stable-decay}
"""
EXPECTED = Run(
    model="somewhere",
    stages=(
        Stage(
            name="one",
            data=(Source(path="a.txt", weight=2), Source(path="b.txt", weight=1)),
            steps=3,
            optimizer=Muon(rate=1e-3),
            schedule=WarmupStableDecay(),
        ),
    ),
)


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_yaml_and_python_say_the_same(tmp_path: Path) -> None:
    assert read_run(written(tmp_path, GOOD)) == EXPECTED
    body = f"return Run.from_dict({EXPECTED.to_dict()!r})"
    code = f"from deepseek.train import Run\ndef run():\n    {body}\n"
    assert read_run(written(tmp_path, code, "run.py")) == EXPECTED
    assert Run.from_dict(EXPECTED.to_dict()) == EXPECTED


@pytest.mark.parametrize(
    "change,words",
    [
        (("steps: 3", ""), "steps or epochs"),
        (("steps: 3", "steps: 3\n    epochs: 1"), "and not both"),
        (("steps: 3", "epochs: 1"), "left out with weights"),
        (("steps: 3", "steps: 0"), "positive"),
        (("steps: 3", "step: 3"), "Did you mean 'steps'"),
        (("name: one", "name: a/b"), "letters, digits"),
        (("weight: 2", "weight: null"), "every source or none"),
        (("kind: muon", "kind: moon"), "one of 'adamw', 'muon'"),
        (("rate: 1e-3", "rate: -1"), "positive number"),
        (("rate: 1e-3", "rate: fast"), "of type float"),
        (("steps: 3", "steps: 3\n    exit_loss: {layers: [1, 2]}"), "from 2 on, ascending"),
        (("steps: 3", "steps: 3\n    exit_loss: {layers: [4], scale: 2}"), "at most 1"),
        (("model: somewhere", ""), "model or preset"),
        (("model: somewhere", "preset: base"), "given with a preset"),
        (("model: somewhere", "model: [1"), "YAML"),
        (("model: somewhere", "model: a\nkeep_checkpoints: 0"), "keep_checkpoints"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    with pytest.raises(DeepseekError, match=words):
        read_run(written(tmp_path, GOOD.replace(*change)))


@pytest.mark.parametrize(
    "name,text,words",
    [
        ("run.py", "x = ", "SyntaxError"),
        ("run.py", "def go(): ...", "run"),
        ("run.py", "def run():\n    return 3", "deepseek.train.Run"),
        ("run.py", "def run():\n    return 1 / 0", "ZeroDivisionError"),
        ("run.yaml", "- 1", "fields of a Run"),
        ("run.toml", "", r"\.yaml or \.py"),
    ],
)
def test_files_that_hold_no_run(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises((ConfigError, FormatError), match=words):
        read_run(written(tmp_path, text, name))
    with pytest.raises(ConfigError, match="a file"):
        read_run(tmp_path / "nothing.yaml")


def test_what_is_taught_has_no_exit_loss() -> None:
    with pytest.raises(ConfigError, match="exit_loss of stage 'one' must be left out"):
        taught = Source(path="a", target="teacher")
        Stage(name="one", data=(taught,), steps=1, exit_loss=ExitLoss(layers=(2,)))


def test_stages_of_one_name_are_refused() -> None:
    stage = Stage(name="one", data=(Source(path="a"),), steps=1)
    with pytest.raises(ConfigError, match="different names"):
        Run(model="x", stages=(stage, stage))
    assert stage.optimizer == AdamW()


def test_the_recipes_of_the_examples_are_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = read_run(REPO / "examples" / "smollm2_draft.yaml")
    assert draft.layers is not None and len(draft.layers) == 8 and draft.needs_teacher
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "python-docstrings.txt").write_text("Return what is asked for.")
    tuned = read_run(REPO / "examples" / "smollm2_ft.py")
    assert tuned.model == "smollm2-135m" and tuned.stages[0].trains == ("*",)
