"""Several processes over gloo: killed, and started again in another number, the bits are the
same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.resume import children
from deepseek.train import Run, prove_run, train
from deepseek.train.summary import read_metrics
from tests.train.conftest import MakeRun
from tests.train.test_resume import assert_same_bits

pytestmark = pytest.mark.dist
LIMIT_S = 120


def longer(run: Run) -> Run:
    first, second = run.stages
    return run.replace(stages=(first.replace(steps=30), second.replace(steps=30)))


def start(run: Run, folder: Path, workers: int) -> subprocess.Popen[str]:
    path = folder.parent / "run.py"
    body = f"return Run.from_dict({run.to_dict()!r})"
    path.write_text(f"from deepseek.train import Run\ndef run():\n    {body}\n")
    words = ["train", str(path), "--out", str(folder), "--workers", str(workers), "--threads", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "deepseek", *words, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def stop_at(process: subprocess.Popen[str], folder: Path, step: int, kind: signal.Signals) -> None:
    """Send a signal to all processes once a step is done; they must still be at work by then."""
    end = time.monotonic() + LIMIT_S
    while steps_done(folder) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    if kind == signal.SIGKILL:
        # the workers have sessions of their own
        for worker in children(process.pid):
            os.kill(worker, kind)
    os.killpg(process.pid, kind)
    process.communicate(timeout=LIMIT_S)


@pytest.fixture(scope="module")
def unbroken(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(longer(make_run()), tmp_path_factory.mktemp("unbroken"))


def test_killed_and_resized_it_ends_the_same(
    make_run: MakeRun, unbroken: Path, tmp_path: Path
) -> None:
    run, folder = longer(make_run()), tmp_path / "out"
    for workers, step, kind in (
        (1, 9, signal.SIGKILL),
        (2, 21, signal.SIGTERM),
        (4, 40, signal.SIGKILL),
    ):
        stop_at(start(run, folder, workers), folder, step, kind)
    process = start(run, folder, 1)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert_same_bits(Path(json.loads(out)["bundle"]), unbroken)
    stages, workers = prove_run(folder)
    assert workers == [1, 2, 4, 1]
    assert [stage.problems for stage in stages] == [(), ()]
    assert losses(folder) == losses(unbroken.parents[1])


def test_three_workers_differ_by_rounding_alone(
    make_run: MakeRun, unbroken: Path, tmp_path: Path
) -> None:
    process = start(longer(make_run()), tmp_path / "out", 3)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    found, expected = losses(tmp_path / "out"), losses(unbroken.parents[1])
    assert found[:20] == pytest.approx(expected[:20], rel=1e-5)
    # a large rate lets the rounding grow
    assert found == pytest.approx(expected, rel=1e-3)
    assert found != expected


def test_a_mistake_is_one_line_from_all_workers(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    stages = (run.stages[0].replace(batch=1, micro_batch=1),)
    process = start(run.replace(stages=stages), tmp_path / "out", 2)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert err.count("one a worker") == 1 and len(err.splitlines()) == 1, err
