"""The figures of a run shown elsewhere as they come: TensorBoard and MLflow, where asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.errors import ConfigError, describe, missing_extra

if TYPE_CHECKING:
    from deepseek.train import Progress

FIGURES = ("loss", "gradient_norm", "rate", "tokens_per_s", "mfu")
"""Fields of a step that are shown, by these names, over the steps of the whole run."""
EXPERIMENT = "deepseek"
"""The MLflow experiment that runs belong to."""
_KNOWN_RUNS = "mlflow.json"

Tracker = Callable[["Progress"], None]


def add_tracker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a verb that trains is asked for trackers."""
    parser.add_argument(
        "--tensorboard", metavar="FOLDER", help="also write the figures there, for TensorBoard"
    )
    parser.add_argument(
        "--mlflow", metavar="URI", help="also send the figures to MLflow (http://localhost:5000)"
    )


def tracker_words(args: argparse.Namespace) -> list[str]:
    """Return the options as words of a command line."""
    named = (("--tensorboard", args.tensorboard), ("--mlflow", args.mlflow))
    return [word for option, value in named if value for word in (option, value)]


@contextlib.contextmanager
def tracking(args: argparse.Namespace, note: Callable[[str], None]) -> Iterator[list[Tracker]]:
    """Yield what is called after each step, closed at the end.

    Args:
        args: with `out` and the options of `add_tracker_arguments`.
        note: told where a tracker is lost on the way.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: the MLflow server does not answer.
    """
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        if args.tensorboard:
            trackers.append(stack.enter_context(contextlib.closing(TensorBoard(args.tensorboard))))
        if args.mlflow:
            server = MLflow(args.mlflow, Path(args.out), note)
            trackers.append(stack.enter_context(contextlib.closing(server)))
        yield trackers


class TensorBoard:
    """Writes the events of a run into a folder, when the first step comes."""

    def __init__(self, folder: str) -> None:
        """Take the folder; raise MissingExtra without the package."""
        self._folder, self._writer = folder, None
        self._module = _imported("torch.utils.tensorboard", "tensorboard", "--tensorboard")

    def __call__(self, progress: Progress) -> None:
        """Show a step."""
        if self._writer is None:
            # steps that are done again after a kill take the place of those shown before
            self._writer = self._module.SummaryWriter(self._folder, purge_step=progress.total_step)
        for name in FIGURES:
            self._writer.add_scalar(name, getattr(progress, name), progress.total_step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """Sends the figures of a run to a server; a run that goes on goes on there too.

    The run's folder holds which run of the server it is. Steps that the server has are not sent
    again. A server that is lost on the way does not stop the training: that is said once.
    """

    def __init__(self, uri: str, folder: Path, note: Callable[[str], None]) -> None:
        """Find the server.

        Args:
            uri: of the server.
            folder: of the run.
            note: told where the server is lost.

        Raises:
            MissingExtra: the package is not installed.
            ConfigError: the server does not answer.
        """
        # figures go where they were asked to go, and to nobody else
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._module = _imported("mlflow", "mlflow-skinny", "--mlflow")
        self._uri, self._folder, self._note = uri, folder, note
        self._run: str | None = None
        self._next, self._is_lost = 0, False
        try:
            self._client = self._module.MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)
        except self._module.MlflowException as error:
            got = " ".join(str(error).split())
            must = "the address of a server that answers"
            raise ConfigError(describe("--mlflow", "deepseek train", must, got)) from error

    def __call__(self, progress: Progress) -> None:
        """Send a step."""
        if self._is_lost:
            return
        try:
            if self._run is None:
                self._run = self._known_run() or self._new_run()
            if progress.total_step >= self._next:
                self._client.log_batch(self._run, metrics=self._metrics(progress))
        except self._module.MlflowException as error:
            self._is_lost = True
            self._note(f"MLflow is told nothing more: {' '.join(str(error).split())[:200]}")

    def close(self) -> None:
        """Say that nothing more comes for now."""
        if self._run is not None and not self._is_lost:
            with contextlib.suppress(self._module.MlflowException):
                self._client.set_terminated(self._run)

    def _metrics(self, progress: Progress) -> list[Any]:
        now = round(time.time() * 1000)
        return [
            self._module.entities.Metric(name, getattr(progress, name), now, progress.total_step)
            for name in FIGURES
        ]

    def _known_run(self) -> str | None:
        """Return the run that this folder began on the server, and learn what it has."""
        found = self._runs().get(self._uri)
        if found is None:
            return None
        try:
            self._client.get_run(found)
        except self._module.MlflowException:  # someone deleted it
            return None
        history = self._client.get_metric_history(found, FIGURES[-1])
        self._next = max((each.step for each in history), default=-1) + 1
        self._client.update_run(found, status="RUNNING")
        return found

    def _new_run(self) -> str:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        place = (
            self._client.create_experiment(EXPERIMENT)
            if experiment is None
            else experiment.experiment_id
        )
        made = self._client.create_run(place, run_name=self._folder.resolve().name).info.run_id
        known = {**self._runs(), self._uri: made}
        (self._folder / _KNOWN_RUNS).write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        return made

    def _runs(self) -> dict[str, str]:
        path = self._folder / _KNOWN_RUNS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _imported(module: str, package: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(package, "track", f"for {option}") from error
