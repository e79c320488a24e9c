"""Teacher and student trained together: both learn, by gradients of their own, and go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from deepseek.compress.distil import Progressive, progress
from deepseek.compress.distil.progressive import _Together
from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.optim import AdamW
from deepseek.train import Part, Source
from tests.compress.learners import Killed, decoder, encoder, kill_after, work_of, write_sums
from tests.tolerances import assert_close


def settings(text: Path, **changes: object) -> Progressive:
    values: dict[str, object] = {
        "data": (Source(path=str(text)),),
        "steps": 8,
        "length": 24,
        "batch": 8,
        "micro_batch": 4,
        "precision": "float32",
        "optimizer": AdamW(rate=1e-2, weight_decay=0.0),
        "checkpoint_every": 100,
    }
    return Progressive(**{**values, **changes})  # type: ignore[arg-type]


def part(step: int) -> Part:
    torch.manual_seed(step)
    counted = torch.ones(2, 9, dtype=torch.bool)
    counted[:, 0] = False
    return Part(torch.randint(0, 258, (2, 9)), counted, torch.ones(2).bool(), step)


@pytest.mark.parametrize("checkpoints", [None, 2])
def test_each_gets_its_own_gradient(checkpoints: int | None) -> None:
    teacher, student = decoder(1, num_layers=3), decoder(2)
    objective = _Together(teacher, settings(Path("x"), checkpoints=checkpoints, tokens=0.5))
    objective.begin(student)
    work = part(0)
    objective.loss(student, work).backward()
    plain, taught = decoder(1, num_layers=3), decoder(2)
    theirs = plain(work.tokens).logits[:, :-1].log_softmax(-1)
    F.nll_loss(theirs.flatten(0, 1), work.tokens[:, 1:].flatten(), reduction="sum").backward()
    ours = taught(work.tokens).logits[:, :-1].log_softmax(-1)
    alone = F.nll_loss(ours.flatten(0, 1), work.tokens[:, 1:].flatten(), reduction="sum")
    distance = F.kl_div(ours, theirs.detach(), reduction="sum", log_target=True)
    (distance + 0.5 * alone).backward()
    for mine, reference in ((teacher, plain), (student, taught)):
        for name, value in reference.named_parameters():
            found = mine.get_parameter(name).grad
            assert found is not None and value.grad is not None
            assert_close(found / 10, value.grad / 10)
    objective.end(student)
    assert set(student.state_dict()) == set(taught.state_dict())


def test_a_checkpoint_is_learned_from_until_the_next() -> None:
    teacher, student = decoder(1, tie_embeddings=True), decoder(2)
    objective = _Together(teacher, settings(Path("x"), checkpoints=2, steps=8))
    objective.begin(student)
    lesson = student.get_submodule("lesson")
    checkpoint = lesson.get_submodule("checkpoint")
    assert isinstance(checkpoint, Decoder) and not list(checkpoint.parameters())
    first = teacher.lm_head.weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            teacher.lm_head.weight += 1.0
        objective.loss(student, part(step))
        expected = first + (1 if step < 4 else 5)
        assert_close(checkpoint.lm_head.weight, expected)
        assert_close(checkpoint.model.embed_tokens.weight, expected)


def test_a_student_learns_what_its_teacher_learns(tmp_path: Path) -> None:
    text = write_sums(tmp_path / "sums.txt")
    teacher = decoder(1, init_std=0.05)
    work = work_of(decoder(2, num_layers=1, init_std=0.05), teacher, tmp_path)
    found = {item.name: item.value for item in progress(settings(text, steps=60), work)}
    assert found["training_loss"] < 0.6 * found["first_training_loss"]
    assert isinstance(work.model, Decoder) and work.model.tokenizer is not None
    tokens = torch.tensor([work.model.tokenizer.encode(text.read_text()[:200])])
    with torch.no_grad():
        assert float(work.model.loss(tokens, tokens)) < 3.0


@pytest.mark.parametrize("checkpoints", [None, 3])
def test_a_killed_stage_ends_the_same(checkpoints: int | None, tmp_path: Path) -> None:
    text = write_sums(tmp_path / "sums.txt")
    stage = settings(text, checkpoints=checkpoints, checkpoint_every=2)
    whole = work_of(decoder(2, num_layers=1), decoder(1), tmp_path, "whole")
    progress(stage, whole)
    for steps in (5, 2):
        with pytest.raises(Killed):
            killed = work_of(decoder(2, num_layers=1), decoder(1), tmp_path, "killed")
            progress(stage, kill_after(killed, steps))
    last = work_of(decoder(2, num_layers=1), decoder(1), tmp_path, "killed")
    progress(stage, last)
    ours, theirs = whole.model.state_dict(), last.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    text = write_sums(tmp_path / "sums.txt")
    with pytest.raises(ConfigError, match="decoder"):
        progress(settings(text), work_of(encoder(1), encoder(2), tmp_path))
    with pytest.raises(ConfigError, match="checkpoints"):
        settings(text, checkpoints=9)
    with pytest.raises(ConfigError, match="temperature"):
        settings(text, temperature=0.0)
