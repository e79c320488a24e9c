"""Trackers: every step once, at its place in the whole run, through a kill."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deepseek.train.summary import read_metrics
from tests.cli.conftest import Run

STEPS = 6


@pytest.fixture
def written(tiny_folder: str, tmp_path: Path) -> Path:
    """Return a run of two stages of three steps on a text."""
    (tmp_path / "text.txt").write_text("one and one are two. " * 60)
    common = {"data": [{"path": str(tmp_path / "text.txt")}], "steps": 3, "length": 32, "batch": 4}
    stages = [{"name": name, **common} for name in ("first", "second")]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": tiny_folder, "stages": stages, "checkpoint_every": 2}))
    return path


@pytest.fixture
def killed(run: Run, written: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return what trains with an option, killed after the fifth step, and to the end."""

    def train(*option: str) -> Path:
        from deepseek.cli.trackers import MLflow, TensorBoard

        out = written.parent / "out"
        words = ("train", str(written), "--out", str(out), *option)
        kind = TensorBoard if option[0] == "--tensorboard" else MLflow
        whole = kind.__call__

        def dying(self: object, progress: object) -> None:
            whole(self, progress)
            if progress.total_step == 4:
                raise RuntimeError("as if killed")

        with monkeypatch.context() as patch:
            patch.setattr(kind, "__call__", dying)
            assert run(*words).code == 70
        ended = run(*words)
        assert ended.code == 0, ended.err
        return out

    return train


def test_tensorboard_has_each_step_once(killed: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = killed("--tensorboard", str(tmp_path / "events"))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    expected = [line["loss"] for line in read_metrics(out)]
    assert [event.step for event in events.Scalars("loss")] == list(range(STEPS))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected)
    assert set(events.Tags()["scalars"]) == {"loss", "gradient_norm", "rate", "tokens_per_s", "mfu"}


def test_mlflow_has_each_step_once_in_one_run(
    killed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "server").as_uri()
    out = killed("--mlflow", uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "deepseek"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "out"
    history = client.get_metric_history(found.info.run_id, "loss")
    expected = [line["loss"] for line in read_metrics(out)]
    assert [metric.step for metric in history] == list(range(STEPS))
    assert [metric.value for metric in history] == pytest.approx(expected)


def test_a_server_that_does_not_answer_is_one_line(
    run: Run, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ended = run("train", str(written), "--out", str(tmp_path), "--mlflow", "http://127.0.0.1:9")
    assert ended.code == 2
    assert "--mlflow of deepseek train must be" in ended.err and ended.err.count("\n") == 1


@pytest.mark.parametrize(
    "option,package", [("--tensorboard", "tensorboard"), ("--mlflow", "mlflow")]
)
def test_a_missing_package_is_named(
    option: str, package: str, run: Run, written: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in [each for each in sys.modules if each.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    ended = run("train", str(written), "--out", str(tmp_path / "out"), option, "x")
    assert ended.code == 2
    assert 'pip install "deepseek-stack[track]"' in ended.err
