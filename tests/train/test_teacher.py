"""Sources that learn from a teacher: the loss, what it writes, and runs that stop on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.models import Decoder, RoutedPlanner
from deepseek.models.depth import keep_layers
from deepseek.ops.routing import Routing
from deepseek.optim import AdamW
from deepseek.train import Interrupted, Run, Source, Stage, prove_run, train
from deepseek.train.teacher import taught_loss, write_texts
from tests.generate.conftest import TINY, byte_tokenizer
from tests.tolerances import assert_close
from tests.train.conftest import MakeRun
from tests.train.test_resume import Killed, assert_same_bits, dying_at


def decoder(seed: int) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(TINY)
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    return model


def test_the_loss_is_that_of_whole_logits_with_gradients() -> None:
    model, teacher = decoder(1), decoder(2)
    tokens = torch.randint(0, 258, (4, 12))
    counted = torch.rand(4, 12) > 0.3
    is_taught = torch.tensor([True, False, True, False])
    found = taught_loss(model, teacher, tokens, counted, is_taught)
    found.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad()
    ours = model(tokens).logits[:, :-1].log_softmax(-1)
    theirs = teacher(tokens).logits[:, :-1].log_softmax(-1).detach()
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    losses = -ours.gather(-1, tokens[:, 1:, None])[..., 0]
    expected = torch.where(is_taught[:, None], divergence, losses)[counted[:, 1:]].sum()
    expected.backward()
    assert_close(found, expected)
    for name, value in model.named_parameters():
        assert value.grad is not None
        assert_close(gradients[name] / 10, value.grad / 10)
    assert all(value.grad is None for value in teacher.parameters())


def test_a_model_taught_by_itself_has_nothing_to_learn(
    start_folder: Path, text: Path, tmp_path: Path
) -> None:
    source = Source(path=str(text), target="teacher")
    common = {"length": 24, "batch": 4, "precision": "float32"}
    stage = Stage(name="one", data=(source,), steps=2, **common)  # type: ignore[arg-type]
    losses = []
    run = Run(model=str(start_folder), stages=(stage,))
    train(run, tmp_path, report=lambda progress: losses.append(progress.loss))
    assert losses[0] == pytest.approx(0.0, abs=1e-5)


def test_a_smaller_model_comes_near_its_teacher(
    start_folder: Path, text: Path, tmp_path: Path
) -> None:
    """A decoder of one of two layers learns what the whole one predicts."""
    source = Source(path=str(text), target="teacher")
    common = {"length": 24, "batch": 4, "precision": "float32", "optimizer": AdamW(rate=1e-2)}
    stage = Stage(name="one", data=(source,), steps=30, **common)  # type: ignore[arg-type]
    losses = []
    run = Run(model=str(start_folder), layers=(1,), stages=(stage,))
    folder = train(run, tmp_path, report=lambda progress: losses.append(progress.loss))
    assert losses[-1] < 0.7 * losses[0]
    smaller = hub.load(folder)
    assert isinstance(smaller, Decoder) and smaller.config.num_layers == 1


def test_kept_layers_are_those_of_the_model() -> None:
    model = decoder(1)
    every = keep_layers(model, range(TINY.num_layers))
    tokens = torch.randint(0, 258, (1, 9))
    assert torch.equal(every(tokens).logits, model(tokens).logits)
    last = keep_layers(model, [TINY.num_layers - 1])
    ours, theirs = last.model.layers[0].mlp, model.model.layers[-1].mlp
    assert torch.equal(ours.up_proj.weight, theirs.up_proj.weight)
    for wrong in ([], [1, 0], [0, 0], [99], [-1]):
        with pytest.raises(ConfigError, match="layers"):
            keep_layers(model, wrong)


def test_kept_layers_choose_as_the_model_does() -> None:
    model, routing = decoder(1), Routing(recent=2, least=256)
    model.planner = RoutedPlanner(model.config, routing)
    planner = keep_layers(model, [0]).planner
    assert isinstance(planner, RoutedPlanner) and planner.routing == routing


def test_a_teacher_writes_on_where_it_was_stopped(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    left = [2]

    def goes_on() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    def written(path: Path, goes_on=lambda: None) -> list[list[int]]:
        texts = write_texts(
            decoder(1),
            path,
            num_tokens=20_000,
            seed=3,
            goes_on=goes_on,
            report=lambda words, share: None,
        )
        return [list(text.tokens) for text in texts]

    whole = written(tmp_path / "whole.jsonl")
    assert sum(map(len, whole)) >= 20_000
    path = tmp_path / "parts.jsonl"
    with pytest.raises(Stopped):
        written(path, goes_on)
    with path.open("a") as file:
        file.write("[[1, 2")  # the process died while it wrote
    assert written(path) == whole
    assert (tmp_path / "whole.jsonl").read_text() == path.read_text()


def replaying(run: Run) -> Run:
    first, _ = run.stages
    sources = (
        first.data[0].replace(weight=0.5),
        Source(path="teacher-text", num_tokens=3000, target="teacher", weight=0.5),
    )
    return run.replace(stages=(first.replace(data=sources),))


def test_a_run_with_a_teacher_goes_on_where_it_was_killed(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = replaying(make_run())
    unbroken = train(run, tmp_path / "unbroken")
    with pytest.raises(Killed):
        train(run, tmp_path / "killed", report=dying_at(3))
    assert_same_bits(train(run, tmp_path / "killed"), unbroken)
    (proof,), _ = prove_run(tmp_path / "killed")
    assert proof.problems == ()


def test_a_signal_stops_the_writing_too(make_run: MakeRun, tmp_path: Path) -> None:
    def preparing(words: str, share: float) -> None:
        assert "teacher" in words and 0 <= share < 1
        os.kill(os.getpid(), signal.SIGTERM)

    run = replaying(make_run())
    with pytest.raises(Interrupted):
        train(run, tmp_path / "stopped", preparing=preparing)
    assert_same_bits(train(run, tmp_path / "stopped"), train(run, tmp_path / "unbroken"))


def test_what_a_teacher_cannot_do_is_said() -> None:
    with pytest.raises(ConfigError, match="num_tokens"):
        Source(path="teacher-text")
    with pytest.raises(ConfigError, match="num_tokens"):
        Source(path="x", num_tokens=3)
    stage = Stage(name="one", data=(Source(path="x", target="teacher"),), steps=1)
    with pytest.raises(ConfigError, match="teacher"):
        Run(preset="base", tokenizer="x", stages=(stage,))


def test_a_teacher_of_other_tokens_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    other = Decoder(TINY.replace(vocab_size=300))
    other.tokenizer = byte_tokenizer()
    hub.save(other, tmp_path / "other", name="other")
    run = replaying(make_run()).replace(teacher=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="teacher"):
        train(run, tmp_path / "run")
