"""Distillation as a stage: a student comes nearer to its teacher, and a killed one goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.compress import Work
from deepseek.compress.distil import Distil, Imitation, Student, distil, make_student
from deepseek.data import Document, Windows, one_a_row, write_corpus
from deepseek.errors import ConfigError
from deepseek.models import Decoder, Encoder
from deepseek.optim import AdamW
from deepseek.train import Source
from tests.compress.learners import (
    Killed,
    decoder,
    encoder,
    kill_after,
    marking_tokenizer,
    work_of,
    write_sums,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("text") / "sums.txt")


def settings(text: Path, **changes: object) -> Distil:
    values: dict[str, object] = {
        "data": (Source(path=str(text)),),
        "steps": 30,
        "length": 24,
        "batch": 8,
        "micro_batch": 4,
        "precision": "float32",
        "optimizer": AdamW(rate=1e-2, weight_decay=0.0),
        "checkpoint_every": 100,
    }
    return Distil(**{**values, **changes})  # type: ignore[arg-type]


def same_bits(one: Decoder | Encoder, other: Decoder | Encoder) -> bool:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def far(model: Decoder, teacher: Decoder, text: Path) -> float:
    """Return the mean divergence from a teacher on the first characters of a text."""
    assert model.tokenizer is not None
    tokens = torch.tensor([model.tokenizer.encode(text.read_text()[:200])])
    with torch.no_grad():
        ours, theirs = (each(tokens).logits.log_softmax(-1) for each in (model, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_a_student_comes_nearer_to_its_teacher(text: Path, tmp_path: Path) -> None:
    teacher = decoder(1, num_layers=4)
    work = work_of(teacher, teacher, tmp_path)
    (kept,) = make_student(Student(num_layers=2, hidden_size=16), work)
    assert 0.2 < kept.value < 0.6
    student = work.model
    assert isinstance(student, Decoder) and student.config.hidden_size == 16
    before = far(student, teacher, text)
    told: list[tuple[str, float | None]] = []
    work.report = lambda words, share: told.append((words, share))
    found = distil(settings(text, imitation=Imitation(hidden=0.1, relations=0.1)), work)
    assert work.model is student and not student.training and student.bundle is None
    assert far(student, teacher, text) < 0.6 * before
    by_name = {item.name: item.value for item in found}
    assert by_name["training_loss"] < 0.7 * by_name["first_training_loss"]
    assert len(told) == 30 and told[-1][1] == 1.0 and "30/30" in told[-1][0]
    assert set(student.state_dict()) == set(decoder(1).state_dict())


def narrow(seed: int) -> Decoder:
    return decoder(seed, hidden_size=16)


def test_a_killed_stage_ends_the_same(text: Path, tmp_path: Path) -> None:
    teacher = decoder(1)
    stage = settings(
        text, steps=7, checkpoint_every=2, imitation=Imitation(hidden=0.5, relations=0.5)
    )
    whole = work_of(narrow(2), teacher, tmp_path, "whole")
    distil(stage, whole)
    for steps in (1, 4, 3):
        with pytest.raises(Killed):
            distil(stage, kill_after(work_of(narrow(2), teacher, tmp_path, "killed"), steps))
    last = work_of(narrow(2), teacher, tmp_path, "killed")
    distil(stage, last)
    assert same_bits(whole.model, last.model)
    # and what is done is not done again
    done = kill_after(work_of(narrow(2), teacher, tmp_path, "killed"), 1)
    distil(stage, done)
    assert same_bits(whole.model, done.model)
    with pytest.raises(ConfigError, match="stages"):
        distil(stage.replace(steps=9), work_of(narrow(2), teacher, tmp_path, "killed"))


def test_a_teacher_writes_the_text(tmp_path: Path) -> None:
    teacher = decoder(1)
    data = (Source(path="teacher-text", num_tokens=500),)
    work = work_of(decoder(2, num_layers=1), teacher, tmp_path)
    distil(settings(Path(), data=data, steps=2), work)
    assert list((work.folder / "data").glob("teacher-text*"))


def test_an_encoder_comes_nearer_to_its_teacher(text: Path, tmp_path: Path) -> None:
    teacher = encoder(1)
    work = work_of(teacher, teacher, tmp_path)
    make_student(Student(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24), work)
    stage = settings(text, imitation=Imitation(relations=0.2), steps=60)
    found = {item.name: item.value for item in distil(stage, work)}
    assert found["training_loss"] < 0.6 * found["first_training_loss"]


def test_a_classifier_learns_its_teachers_labels(text: Path, tmp_path: Path) -> None:
    """Of which no text says one: those that the teacher finds are all there is."""
    teacher, student = encoder(1), encoder(2, num_layers=1)
    for seed, model in enumerate((teacher, student)):
        torch.manual_seed(seed)
        model.use_labels(("odd", "even", "neither"))
    texts = text.read_text().splitlines()[:60]
    assert teacher.tokenizer is not None
    encoded = teacher.tokenizer.encode_batch(texts)
    weight, bias = (teacher.get_parameter(f"classifier.{name}") for name in ("weight", "bias"))
    torch.nn.init.normal_(weight, std=20)
    with torch.no_grad():  # every label is found
        bias.copy_(-teacher(*teacher.padded(encoded)).logits.mean(0))
    asked = teacher.classify(texts)
    work = work_of(student, teacher, tmp_path)
    distil(settings(text, imitation=Imitation(hidden=0.0), steps=60), work)
    assert len(set(asked)) > 1
    found = work.model.classify(texts)
    same = sum(one == other for one, other in zip(found, asked, strict=True))
    assert same > 45


def test_an_encoders_killed_stage_ends_the_same(text: Path, tmp_path: Path) -> None:
    teacher, stage = encoder(1), settings(text, steps=5, checkpoint_every=2)
    whole, killed = (work_of(encoder(2), teacher, tmp_path, name) for name in ("one", "two"))
    distil(stage, whole)
    with pytest.raises(Killed):
        distil(stage, kill_after(killed, 3))
    again = work_of(encoder(2), teacher, tmp_path, "two")
    distil(stage, again)
    assert same_bits(whole.model, again.model)


def test_an_encoders_rows_are_lines(tmp_path: Path) -> None:
    tokenizer = marking_tokenizer()
    lines = [tokenizer.encode(line) for line in ("ab", "a longer line", "c")]
    rows = one_a_row((Document(line) for line in lines), 8, 0)
    corpus = write_corpus(
        tmp_path / "rows", rows, name="x", vocab_size=258, tokenizer_sha256="x", source_sha256="x"
    )
    windows = Windows([corpus], length=8)
    assert windows.num_windows == 3
    samples = windows.read(0, 3)
    found = {
        tuple(row[:7].tolist()): targets[:7].tolist()
        for row, targets in zip(samples.tokens, samples.targets, strict=True)
    }
    short, long, _ = lines
    assert found[(*short, 0, 0, 0)] == [False, True, True, True, False, False, False]
    assert found[(*long[:6], 257)] == [False, *[True] * 6]
    assert not samples.targets[:, 7].any()


def test_what_cannot_be_distilled_is_said(text: Path, tmp_path: Path) -> None:
    stage = settings(text, steps=1)
    with pytest.raises(ConfigError, match="kind"):
        distil(stage, work_of(encoder(1), decoder(1), tmp_path / "kinds"))
    with pytest.raises(ConfigError, match="tokenizer"):
        distil(stage, work_of(decoder(1, vocab_size=300), decoder(1), tmp_path / "tokens"))
    written = stage.replace(data=(Source(path="teacher-text", num_tokens=9),))
    with pytest.raises(ConfigError, match="an encoder writes none"):
        distil(written, work_of(encoder(1), encoder(2), tmp_path / "written"))
    with pytest.raises(ConfigError, match="steps"):
        Distil(steps=0)


def test_a_stage_is_written_and_read(text: Path) -> None:
    stage = settings(text, imitation=Imitation(hidden=1.0), teacher="x")
    assert Distil.from_dict(stage.to_dict()) == stage
    assert Work and stage.why_not_after([]) is None
