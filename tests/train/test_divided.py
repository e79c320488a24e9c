"""Runs over a mesh: divided in one way, stopped, and gone on with in another, they learn what one
worker learns."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.optim import AdamW
from deepseek.parallel import Mesh, World
from deepseek.train import ExitLoss, Run, prove_run, train
from deepseek.train.divided import divide
from deepseek.train.origin import open_model
from tests.tolerances import assert_close
from tests.train.conftest import MakeRun
from tests.train.test_workers import LIMIT_S, losses, start, stop_at

MEASURED = AdamW(rate=3e-3, eps=1e-3)
"""Smooth, so that rounding stays rounding."""


def measured(run: Run, steps: int = 7) -> Run:
    """Return a run of two stages whose updates are smooth functions of the gradients; what the
    second trains is not on every process of a pipeline."""
    first, second = run.stages
    first = first.replace(optimizer=MEASURED, steps=steps, max_grad_norm=0.5)
    second = second.replace(optimizer=MEASURED, steps=steps, trains=("model.layers.0.*",))
    return run.replace(stages=(first, second))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = hub.load(folder, dtype="float32")
    assert isinstance(model, Decoder)
    return dict(model.named_parameters())


@pytest.mark.dist
def test_divided_anew_at_every_start(make_run: MakeRun, tmp_path: Path) -> None:
    run, folder = measured(make_run()), tmp_path / "out"
    expected = train(run, tmp_path / "whole")
    meshes = ((Mesh(tensor=2), 2, 2), (Mesh(), 1, 4), (Mesh(shard=2), 2, 8))
    for mesh, workers, step in meshes:
        process = start(run.replace(mesh=mesh), folder, workers)
        stop_at(process, folder, step, signal.SIGTERM)
    process = start(run.replace(mesh=Mesh(pipeline=2, tensor=2)), folder, 4)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    found = weights(Path(json.loads(out)["bundle"]))
    for name, value in weights(expected).items():
        assert_close(found[name], value)
    stages, workers = prove_run(folder)
    assert workers == [2, 1, 2, 4]
    assert [stage.problems for stage in stages] == [(), ()]


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (Mesh(tensor=3), "a divisor of the model's num_heads"),
        (Mesh(pipeline=3), "at most the number of layers"),
        (Mesh(expert=3), "1 for a model without experts"),
        (Mesh(tensor=2), "multiply to the 3 processes"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(make_run: MakeRun, mesh: Mesh, said: str) -> None:
    run = make_run(mesh=mesh)
    with pytest.raises(ConfigError, match=said):
        divide(run, open_model(run), World(0, 3))


def test_a_divided_model_has_no_exit_loss(make_run: MakeRun) -> None:
    run = make_run(mesh=Mesh(tensor=2))
    stages = tuple(stage.replace(exit_loss=ExitLoss(layers=(2,))) for stage in run.stages)
    with pytest.raises(ConfigError, match="exit_loss of stage 'first' over a mesh"):
        divide(run.replace(stages=stages), open_model(run), World(0, 2))


def test_replicas_alone_divide_nothing(make_run: MakeRun) -> None:
    run = make_run()
    assert divide(run, open_model(run), World(0, 3)) is None
