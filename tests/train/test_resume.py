"""A run that is killed and goes on ends as one that was not: same bits, every sample once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.errors import CapacityError, ConfigError, FormatError
from deepseek.models import Decoder
from deepseek.train import Interrupted, LowRank, Progress, Run, Stage, prove_run, train
from deepseek.train import checkpoint as checkpoint_module
from deepseek.train.summary import read_metrics
from tests.tolerances import assert_close
from tests.train.conftest import MakeRun


class Killed(BaseException):
    """Stands for a process that is gone."""


def dying_at(total: int) -> Callable[[Progress], None]:
    """Return a report that dies when so many steps of this start are done."""
    left = [total]

    def report(progress: Progress) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = hub.load(folder)
    assert isinstance(model, Decoder)
    return dict(model.state_dict())


def assert_same_bits(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def unbroken(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the last bundle of a run that nothing happened to."""
    return train(make_run(), tmp_path_factory.mktemp("unbroken"))


def test_a_run_learns_and_writes_a_bundle_a_stage(unbroken: Path) -> None:
    metrics = read_metrics(unbroken.parents[1])
    assert [line["total_step"] for line in metrics] == list(range(11))
    assert metrics[5]["loss"] < metrics[0]["loss"] - 0.3
    bundle = hub.Bundle.open(unbroken)
    assert bundle.card.stage is not None and bundle.card.stage.name == "train second"
    first = hub.Bundle.open(unbroken.with_name("first"))
    assert bundle.card.parents[0].content_hash == first.content_hash


def test_frozen_parameters_stay(unbroken: Path) -> None:
    before, after = weights(unbroken.with_name("first")), weights(unbroken)
    for name, value in before.items():
        assert torch.equal(value, after[name]) != name.startswith("model.layers.")


def test_a_stage_ends_on_the_average_with_what_it_began_with(
    make_run: MakeRun, unbroken: Path, tmp_path: Path
) -> None:
    run = make_run()
    first, second = run.stages
    run = run.replace(stages=(first, second.replace(start_share=0.25)))
    with pytest.raises(Killed):
        train(run, tmp_path, report=dying_at(9))
    end = train(run, tmp_path)
    old, new = weights(unbroken.with_name("first")), weights(unbroken)
    for name, value in weights(end).items():
        assert_close(value, 0.25 * old[name] + 0.75 * new[name])


def test_averaging_leaves_a_grid_and_is_refused(make_run: MakeRun) -> None:
    stage = make_run().stages[0]
    with pytest.raises(ConfigError, match=r"start_share.*must be 0 on a grid"):
        stage.replace(start_share=0.5, adapter=LowRank(base="int4"))
    with pytest.raises(ConfigError, match="start_share"):
        stage.replace(start_share=1.0)


@pytest.mark.parametrize("seed", range(8))
def test_killed_anywhere_it_ends_the_same(
    seed: int, make_run: MakeRun, unbroken: Path, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        try:
            end = train(make_run(), tmp_path, report=dying_at(chance.randint(1, 5)))
            break
        except Killed:
            continue
    else:
        pytest.fail("it never got to the end")
    assert_same_bits(end, unbroken)
    stages, starts = prove_run(tmp_path)
    assert [stage.problems for stage in stages] == [(), ()]
    assert [stage.num_samples for stage in stages] == [48, 40]
    assert len(starts) > 1
    assert [line["total_step"] for line in read_metrics(tmp_path)] == list(range(11))


def test_a_run_that_is_done_is_left_alone(make_run: MakeRun, tmp_path: Path) -> None:
    end = train(make_run(), tmp_path)
    before = end.stat().st_mtime_ns
    assert train(make_run(), tmp_path, report=dying_at(1)) == end
    assert end.stat().st_mtime_ns == before


def test_moments_go_on_where_asked(make_run: MakeRun, tmp_path: Path) -> None:
    (first, _), folders = make_run().stages, {}
    for keeps in (True, False):
        second = first.replace(name="second", keeps_moments=keeps)
        run = make_run(stages=(first, second))
        whole = train(run, tmp_path / f"whole-{keeps}")
        for kill in (7, 9):  # before and after the first checkpoint of the second stage
            folder = tmp_path / f"cut-{keeps}-{kill}"
            with pytest.raises(Killed):
                train(run, folder, report=dying_at(kill))
            assert_same_bits(train(run, folder), whole)
        folders[keeps] = whole
    with pytest.raises(AssertionError):
        assert_same_bits(folders[True], folders[False])


def test_recomputing_changes_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    ends = []
    for recompute in (False, True):
        stages = tuple(stage.replace(recompute=recompute) for stage in make_run().stages)
        ends.append(train(make_run(stages=stages), tmp_path / str(recompute)))
    assert_same_bits(*ends)


def test_a_signal_saves_and_says_so(make_run: MakeRun, unbroken: Path, tmp_path: Path) -> None:
    import os
    import signal

    def report(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(make_run(), tmp_path, report=report)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
    assert_same_bits(train(make_run(), tmp_path), unbroken)


@pytest.mark.parametrize("damage", ["flipped", "cut", "state", "half"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, make_run: MakeRun, unbroken: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(make_run(), tmp_path, report=dying_at(5))
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    data = next(newest.glob("*.distcp"))
    whole = bytearray(data.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2] ^= 1
        data.write_bytes(whole)
    elif damage == "cut":
        data.write_bytes(whole[:-1])
    elif damage == "state":
        (newest / "state.json").write_text("{}")
    else:
        newest.rename(newest.with_name(f".{newest.name}.new"))
    assert_same_bits(train(make_run(), tmp_path), unbroken)


def test_only_damaged_checkpoints_are_one_error(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(make_run(), tmp_path, report=dying_at(3))
    for state in (tmp_path / "checkpoints").glob("*/state.json"):
        state.unlink()
    with pytest.raises(FormatError, match="checkpoint"):
        train(make_run(), tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(
    make_run: MakeRun, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, count = checkpoint_module.save_state, [0]

    def full(*args: object, **settings: object) -> object:
        count[0] += 1
        if count[0] == 2:
            raise OSError(28, "No space left on device")
        return whole(*args, **settings)

    monkeypatch.setattr(checkpoint_module, "save_state", full)
    with pytest.raises(CapacityError, match="step-00000002 is whole"):
        train(make_run(), tmp_path)
    assert_same_bits(train(make_run(), tmp_path), unbroken)


def test_divergence_is_one_error(make_run: MakeRun, tmp_path: Path) -> None:
    (first, _) = make_run().stages
    stage = first.replace(optimizer=first.optimizer.replace(rate=1e30), max_grad_norm=None)
    with pytest.raises(ConfigError, match="a finite loss and gradient"):
        train(make_run(stages=(stage,)), tmp_path)


def test_another_run_may_not_go_on_here(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(make_run(), tmp_path, report=dying_at(3))
    with pytest.raises(ConfigError, match="differ in seed"):
        train(make_run(seed=1), tmp_path)
    train(make_run(checkpoint_every=3), tmp_path)


def test_other_data_may_not_go_on_here(make_run: MakeRun, tmp_path: Path, text: Path) -> None:
    copy = tmp_path / "text.txt"
    copy.write_text(text.read_text())
    run = with_source(make_run(), copy)
    with pytest.raises(Killed):
        train(run, tmp_path / "out", report=dying_at(3))
    copy.write_text(text.read_text().replace("are", "is "))
    with pytest.raises(ConfigError, match="what the stage began with"):
        train(run, tmp_path / "out")


def with_source(run: Run, path: Path) -> Run:
    def changed(stage: Stage) -> Stage:
        return stage.replace(data=(stage.data[0].replace(path=str(path)),))

    return run.replace(stages=tuple(changed(stage) for stage in run.stages))
