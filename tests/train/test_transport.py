"""Gradients in few bits: what was not sent yet is part of the state, and outlives any stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from deepseek.models import Decoder
from deepseek.parallel import Sparse24, World
from deepseek.parallel.sparse import own_errors
from deepseek.train import Run, prove_run, train
from deepseek.train.checkpoint import Checkpoints, Position
from tests.generate.conftest import TINY
from tests.train.conftest import MakeRun
from tests.train.test_resume import assert_same_bits
from tests.train.test_workers import LIMIT_S, longer, losses, start, stop_at


def sparse(run: Run, *, sends_early: bool = True) -> Run:
    changes = {"transport": Sparse24(), "sends_early": sends_early}
    return run.replace(stages=tuple(stage.replace(**changes) for stage in longer(run).stages))


def test_a_checkpoint_keeps_what_was_not_sent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, checkpoints = Decoder(TINY), Checkpoints(tmp_path, World(), 2)
    errors = {f"bucket-{number}.worker-0-of-1": torch.randn(100 + number) for number in range(2)}
    expected = {name: error.clone() for name, error in errors.items()}
    checkpoints.save(Position(total_steps=1), model, [], errors)
    errors["bucket-0.worker-0-of-1"].zero_()
    checkpoints.wait()
    found = checkpoints.find()
    assert found is not None
    read = checkpoints.remembered(found[0])
    assert sorted(read) == sorted(expected) and len(read) == 2
    assert all(torch.equal(read[name], error) for name, error in expected.items())
    checkpoints.load(model, [], found[0])
    checkpoints.save(Position(total_steps=2), model, [])
    checkpoints.close()
    assert dict(checkpoints.remembered(tmp_path / "step-00000002")) == {}


def test_one_worker_alone_trains_exactly(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    packed = run.replace(stages=tuple(stage.replace(transport=Sparse24()) for stage in run.stages))
    assert_same_bits(train(run, tmp_path / "exact"), train(packed, tmp_path / "packed"))
    assert Run.from_dict(json.loads(json.dumps(packed.to_dict()))) == packed


def finished(run: Run, folder: Path, workers: int) -> Path:
    process = start(run, folder, workers)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    return Path(json.loads(out)["bundle"])


@pytest.fixture(scope="module")
def unbroken(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of two workers that nothing happened to."""
    return finished(sparse(make_run()), tmp_path_factory.mktemp("unbroken") / "out", 2)


@pytest.mark.dist
def test_killed_it_ends_the_same(make_run: MakeRun, unbroken: Path, tmp_path: Path) -> None:
    run, folder = sparse(make_run()), tmp_path / "out"
    stop_at(start(run, folder, 2), folder, 9, signal.SIGKILL)
    stop_at(start(run, folder, 2), folder, 21, signal.SIGTERM)
    stop_at(start(run, folder, 2), folder, 40, signal.SIGKILL)
    assert_same_bits(finished(run, folder, 2), unbroken)
    stages, workers = prove_run(folder)
    assert workers == [2, 2, 2, 2] and [stage.problems for stage in stages] == [(), ()]


@pytest.mark.dist
def test_when_gradients_are_sent_does_not_show(
    make_run: MakeRun, unbroken: Path, tmp_path: Path
) -> None:
    assert_same_bits(finished(sparse(make_run(), sends_early=False), tmp_path / "o", 2), unbroken)


@pytest.mark.dist
def test_the_number_of_workers_may_change(
    make_run: MakeRun, unbroken: Path, tmp_path: Path
) -> None:
    run, folder = sparse(make_run()), tmp_path / "out"
    stop_at(start(run, folder, 1), folder, 5, signal.SIGTERM)
    stop_at(start(run, folder, 2), folder, 12, signal.SIGTERM)
    checkpoints = Checkpoints(folder / "checkpoints", World(), 2)
    found = checkpoints.find()
    assert found is not None
    read = dict(checkpoints.remembered(found[0]))
    assert {name.partition(".")[2] for name in read} == {"worker-0-of-2", "worker-1-of-2"}
    parts = [own_errors(checkpoints.remembered(found[0]), World(rank, 4)) for rank in range(4)]
    for number in parts[0]:
        old = sum(read[f"bucket-{number}.worker-{rank}-of-2"] for rank in range(2))
        assert old.any() and torch.equal(old, sum(part[number] for part in parts))
    stop_at(start(run, folder, 4), folder, 24, signal.SIGTERM)
    finished(run, folder, 1)
    stages, workers = prove_run(folder)
    assert workers == [1, 2, 4, 1] and [stage.problems for stage in stages] == [(), ()]
    assert losses(folder)[-1] == pytest.approx(losses(unbroken.parents[1])[-1], rel=0.2)
