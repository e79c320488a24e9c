"""The penalty on gates: a mean over predicted tokens that parts, kills and recomputing leave alone;
heads close by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.data import Windows
from deepseek.errors import ConfigError
from deepseek.face import load
from deepseek.models import Decoder, GateConfig, GateWatch, add_gates
from deepseek.optim import AdamW, Constant, build_optimizers
from deepseek.parallel import Mesh, TreeSum, World
from deepseek.train import LowRank, Run, Stage, read_run, train
from deepseek.train.divided import divide
from deepseek.train.step import BatchStep, StepResult, choose_parameters
from deepseek.train.summary import read_metrics
from tests.generate.conftest import TINY
from tests.train.conftest import MakeRun
from tests.train.test_resume import Killed, assert_same_bits, dying_at, weights
from tests.train.test_step import stage, windows

__all__ = ["windows"]

GATED = GateConfig(threshold=0.5)


def gated() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(TINY.replace(gates=GATED)).double().train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.head_gate.weight.normal_(0, 0.2)
    return model


def take_step(windows: Windows, settings: Stage) -> tuple[Decoder, StepResult]:
    model, world = gated(), World()
    parameters = choose_parameters(model, settings.trains)
    optimizers = build_optimizers(AdamW(rate=1e-2), parameters)
    step = BatchStep(
        model,
        parameters,
        optimizers,
        settings,
        windows,
        world=world,
        transport=TreeSum(world),
        seed=0,
    )
    return model, step.run(0, 1)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_parts_equal_the_whole_batch(windows: Windows, micro_batch: int) -> None:
    """Windows have different numbers of predicted tokens; each counts as much."""
    whole, one = take_step(windows, stage(gate_penalty=0.5))
    parts, other = take_step(windows, stage(gate_penalty=0.5, micro_batch=micro_batch))
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.mean_gate == pytest.approx(one.mean_gate, rel=1e-6)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)


def test_what_is_lowered_is_the_loss_and_the_mean_gate_of_the_predicted_tokens(
    windows: Windows,
) -> None:
    """The gradient, against one that is made by hand."""
    _, found = take_step(windows, stage(gate_penalty=50.0, max_grad_norm=None))
    model, samples = gated(), windows.read(0, 8)
    tokens = torch.from_numpy(samples.tokens)
    counted = torch.from_numpy(samples.targets)
    with GateWatch(model) as watch:
        loss = model.loss(tokens, torch.where(counted, tokens, -100))
    gate = watch.by_token()[:, :-1][counted[:, 1:]].mean()
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    assert found.mean_gate == pytest.approx(gate.item(), rel=1e-6)
    (loss + 50 * gate).backward()
    norm = torch.nn.utils.get_total_norm([value.grad for value in model.parameters()])
    assert found.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    _, without = take_step(windows, stage(max_grad_norm=None))
    assert without.mean_gate is None and without.loss == pytest.approx(found.loss, rel=1e-9)
    assert without.gradient_norm != pytest.approx(found.gradient_norm, rel=1e-2)


def run_of(make_run: MakeRun, **changes: object) -> Run:
    """Return a run of one stage with a penalty that outweighs the loss, on a model given gates."""
    settings = {"gate_penalty": 2.0, "steps": 8, "optimizer": AdamW(rate=3e-2)} | changes
    first = make_run().stages[0].replace(schedule=Constant(), **settings)
    return make_run(stages=(first,), gates=GATED)


def test_heads_close_and_the_bundle_has_them(make_run: MakeRun, tmp_path: Path) -> None:
    end = train(run_of(make_run), tmp_path)
    metrics = read_metrics(tmp_path)
    assert metrics[0]["mean_gate"] == 1.0
    assert metrics[-1]["mean_gate"] < 0.6
    model = load(end)
    assert model.config.gates == GATED
    with GateWatch(model) as watch:
        model(torch.randint(0, 258, (1, 30)))
    assert watch.count.share > 0.1


def test_killed_or_recomputed_it_ends_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    whole = train(run_of(make_run), tmp_path / "whole")
    with pytest.raises(Killed):
        train(run_of(make_run), tmp_path / "cut", report=dying_at(5))
    assert_same_bits(train(run_of(make_run), tmp_path / "cut"), whole)
    assert_same_bits(train(run_of(make_run, recompute=True), tmp_path / "again"), whole)
    assert any("head_gate" in name and bool(value.any()) for name, value in weights(whole).items())


def test_a_penalty_goes_with_a_teacher(make_run: MakeRun, tmp_path: Path) -> None:
    source = make_run().stages[0].data[0].replace(target="teacher")
    train(run_of(make_run, data=(source,), steps=2), tmp_path)
    first, second = read_metrics(tmp_path)
    assert first["loss"] == pytest.approx(0, abs=1e-5), "with its gates it is its own teacher still"
    assert second["mean_gate"] < first["mean_gate"] == 1.0


def test_a_penalty_without_gates_is_refused_before_the_run(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = run_of(make_run).replace(gates=None)
    with pytest.raises(ConfigError, match=r"gate_penalty of stage 'first' must be 0 for a model"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_bundle_with_gates_needs_no_more(make_run: MakeRun, tmp_path: Path) -> None:
    model = add_gates(load(make_run().model), GATED)
    start = hub.save(model, tmp_path / "start", name="tiny").path
    run = run_of(make_run, steps=1).replace(model=str(start), gates=None)
    assert load(train(run, tmp_path / "run")).config.gates == GATED


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gate_penalty": -1.0}, "gate_penalty of stage 'one' must be from 0 on"),
        ({"gate_penalty": float("inf")}, "gate_penalty of stage 'one' must be from 0 on"),
        ({"gate_penalty": 0.1, "adapter": LowRank()}, "must be 0 with adapters"),
    ],
)
def test_a_penalty_that_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(**wrong)


def test_a_run_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: tiny\ngates: {threshold: 0.1}\n"
        "stages: [{name: close, data: [{path: x}], steps: 1, gate_penalty: 1e-2}]\n"
    )
    run = read_run(path)
    assert run.gates == GateConfig(threshold=0.1) and run.stages[0].gate_penalty == 0.01
    assert Run.from_dict(run.to_dict()) == run


def test_a_mesh_does_not_know_the_penalty(make_run: MakeRun) -> None:
    run = run_of(make_run).replace(mesh=Mesh(tensor=2))
    with pytest.raises(ConfigError, match="gate_penalty of stage 'first' over a mesh must be 0"):
        divide(run, Decoder(TINY), World(0, 2))
