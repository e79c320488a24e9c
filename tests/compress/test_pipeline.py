"""Pipelines: resumed at every border, replayed to the same bytes, refused where they cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from deepseek import hub
from deepseek.compress import Pipeline, SizeGate, Stage, TextGate, Work, compress, read_pipeline
from deepseek.compress import stages as table
from deepseek.errors import ConfigError, VerifyError
from deepseek.hub import Bundle
from deepseek.records import Measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(Stage):
    """Adds noise to every weight."""

    kind: Literal["noise"] = "noise"
    size: float = 0.01
    fails: bool = False


DONE: list[float] = []
KEPT: list[str] = []


def make_noise(stage: Noise, work: Work) -> tuple[Measurement, ...]:
    """Do a stage of noise, and note that it was done."""
    kept = work.folder / "seen"
    KEPT.append(kept.read_text() if kept.exists() else "")
    work.folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(str(stage.size))
    if stage.fails:
        raise KeyboardInterrupt
    DONE.append(stage.size)
    with torch.no_grad():
        for parameter in work.model.parameters():
            parameter.add_(stage.size * torch.randn_like(parameter))
    return (Measurement(name="noise", value=stage.size, unit="1"),)


@pytest.fixture(autouse=True)
def with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stage into the table."""
    monkeypatch.setitem(table.APPLY, Noise, f"{__name__}:make_noise")
    DONE.clear()
    KEPT.clear()


def pipeline(start: Path, *stages: Stage, **settings: Any) -> Pipeline:
    return Pipeline(model=str(start), stages=stages, floor=None, **settings)  # type: ignore[arg-type]


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return dict(hub.load(bundle.path).state_dict())


def test_each_stage_leaves_a_bundle_and_a_line(start: Path, tmp_path: Path) -> None:
    asked = pipeline(start, Noise(size=0.01), Noise(size=0.02))
    done = compress(asked, tmp_path / "run")
    assert done.bundle.path == tmp_path / "run" / "stages" / "2-noise"
    first = Bundle.open(tmp_path / "run" / "stages" / "1-noise")
    assert done.bundle.card.parents[0].content_hash == first.content_hash
    assert first.card.parents[0].content_hash == Bundle.open(start).content_hash
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert [line["stage"] for line in lines] == [1, 2]
    assert lines[1]["parent"] == lines[0]["bundle"] == first.content_hash
    assert lines[1]["bundle"] == done.bundle.content_hash
    assert lines[1]["measurements"][0]["name"] == "noise"
    kinds = {value.dtype for value in weights(first).values()}
    assert kinds == {torch.float32}
    assert {value.dtype for value in weights(done.bundle).values()} == {torch.bfloat16}


def test_a_run_is_repeated_to_the_byte(start: Path, tmp_path: Path) -> None:
    asked = pipeline(start, Noise(), Noise(size=0.1), seed=3)
    one, two = (compress(asked, tmp_path / name).bundle for name in ("one", "two"))
    states = [weights(bundle) for bundle in (one, two)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    other = compress(asked.replace(seed=4), tmp_path / "three").bundle
    assert not all(torch.equal(value, states[0][name]) for name, value in weights(other).items())


def test_it_goes_on_from_the_last_border(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (Noise(size=0.01), Noise(size=0.02), Noise(size=0.03))
    whole = compress(pipeline(start, *stages), tmp_path / "whole").bundle
    DONE.clear()

    def stop(stage: Noise, work: Work) -> tuple[Measurement, ...]:
        if stage.size == 0.02:
            raise KeyboardInterrupt
        return make_noise(stage, work)

    monkeypatch.setitem(table.APPLY, Noise, f"{__name__}:stopping")
    monkeypatch.setitem(globals(), "stopping", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(pipeline(start, *stages), tmp_path / "run")
    monkeypatch.setitem(table.APPLY, Noise, f"{__name__}:make_noise")
    resumed = compress(pipeline(start, *stages), tmp_path / "run").bundle
    assert DONE == [0.01, 0.02, 0.03]
    again = weights(resumed)
    assert all(torch.equal(value, again[name]) for name, value in weights(whole).items())
    compress(pipeline(start, *stages), tmp_path / "run")
    assert DONE == [0.01, 0.02, 0.03]


def test_a_stage_goes_on_from_what_it_kept_of_the_same_start(start: Path, tmp_path: Path) -> None:
    moved = hub.save(hub.load(start), tmp_path / "start").path
    asked = pipeline(moved, Noise(size=0.5, fails=True))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress(asked, tmp_path / "run")
    model = hub.load(moved)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    hub.save(model, moved)
    with pytest.raises(KeyboardInterrupt):
        compress(asked, tmp_path / "run")
    assert KEPT == ["", "0.5", ""]
    compress(pipeline(start, Noise()), tmp_path / "other")
    assert not (tmp_path / "other" / "kept" / "1-noise").exists()


def test_another_start_under_the_same_name_is_seen(start: Path, tmp_path: Path) -> None:
    model = hub.load(start)
    moved = hub.save(model, tmp_path / "start").path
    asked = pipeline(moved, Noise(size=0.01), Noise(size=0.02))
    compress(asked, tmp_path / "run")
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    hub.save(model, moved)
    compress(asked, tmp_path / "run")
    assert DONE == [0.01, 0.02, 0.01, 0.02]


def test_a_folder_in_which_nothing_was_ended_takes_another_pipeline(
    start: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(pipeline(start, Noise(size=0.5, fails=True)), tmp_path / "run")
    compress(pipeline(start, Noise(size=0.01)), tmp_path / "run")
    assert KEPT == ["", ""] and DONE == [0.01]


def test_a_folder_of_something_else_is_left_alone(start: Path, tmp_path: Path) -> None:
    compress(pipeline(start, Noise()), tmp_path / "run")
    with pytest.raises(ConfigError, match="of this same pipeline"):
        compress(pipeline(start, Noise(size=0.5)), tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="new, empty"):
        compress(pipeline(start, Noise()), other)
    assert [item.name for item in other.iterdir()] == ["letter.txt"]


def test_a_broken_model_ends_the_run(start: Path, tmp_path: Path, text: Path) -> None:
    asked = pipeline(start, Noise(size=3.0), Noise()).replace(floor=4.0, floor_text=str(text))
    with pytest.raises(VerifyError, match="behind stage 1"):
        compress(asked, tmp_path / "run")
    assert DONE == [3.0]
    assert not (tmp_path / "run" / "stages").exists()


def test_gates_judge_the_last_bundle_and_mark_it(start: Path, tmp_path: Path, text: Path) -> None:
    gate = TextGate(text=str(text), tokens=1024, window=64, most_perplexity_ratio=1.05)
    asked = pipeline(start, Noise(size=0.5), gates=(gate, SizeGate(most_share=10.0)))
    done = compress(asked, tmp_path / "run")
    assert done.is_refused
    card = Bundle.open(done.bundle.path).card
    assert [verdict.holds for verdict in card.verdicts] == [False, True]
    Bundle.open(done.bundle.path, verify=True)
    easier = asked.replace(gates=(SizeGate(most_share=10.0),))
    again = compress(easier, tmp_path / "run")
    assert not again.is_refused
    assert DONE == [0.5]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded(Stage):
    """Leaves weights on a grid."""

    puts_on_grid = True
    kind: Literal["rounded"] = "rounded"


def test_stages_that_cannot_follow_are_refused(start: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 2 .* lie on the grid of stage 'rounded'"):
        pipeline(start, Rounded(), Noise())
    with pytest.raises(ConfigError, match="at least one"):
        pipeline(start)


def test_a_file_says_the_same_as_python(start: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {start}\n"
        "stages: [{kind: quantize, bits: 8, method: round}]\n"
        "gates: [{kind: size, most_share: 0.3}]\n"
    )
    asked = read_pipeline(path)
    assert Pipeline.from_dict(asked.to_dict()) == asked
    script = tmp_path / "small.py"
    script.write_text(
        "from deepseek.compress import Pipeline, Quantize, SizeGate\n"
        "def pipeline():\n"
        f"    return Pipeline(model={str(start)!r}, stages=(Quantize(bits=8, method='round'),),\n"
        "        gates=(SizeGate(most_share=0.3),))\n"
    )
    assert read_pipeline(script) == asked
    path.write_text("model: x\nstages: [{kind: quantise}]\n")
    with pytest.raises(ConfigError, match="one of"):
        read_pipeline(path)
