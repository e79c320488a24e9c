"""Progressive distillation against one-shot distillation: steps to the same loss.

    python benchmarks/progressive.py --seeds 0 1 2
    python benchmarks/progressive.py --seeds 0 1 2 --steps 2000 --json

Models of bytes, trained here from nothing on the text inside Python, with the same samples in the
same order at a constant rate: teachers of one beginning, and students of one. One-shot: the teacher
is trained, then a student learns from it, both for `--steps`. Progressive: in each step a teacher
learns and a student learns from it, as it is then or from its newest checkpoint, for at most as
many steps as one-shot has in all. Alone: a student learns the text without a teacher, as long.
`tokens` stands where a student of a teacher also learns the text itself. The mark is the least loss
that a one-shot student has at its end, in nats of a byte of text that was kept back, read as the
mean of the newest three points of a curve.

Told for each seed of those that reach the mark: by how many steps fewer, of the student and of both
(one-shot's teacher is trained before), and by how much less time of the processor, of both and
without the measuring on the way. What is negative takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from rich.console import Console
from rich.table import Column, Table
from tokenizers import decoders, models, pre_tokenizers

from deepseek import hub, train
from deepseek.cli.models import positive
from deepseek.compress import Work
from deepseek.compress.distil import Distil, Imitation, Progressive, distil, progress
from deepseek.data import Tokenizer
from deepseek.errors import DeepseekError
from deepseek.evaluate import default_corpus
from deepseek.models import Decoder, DecoderConfig
from deepseek.ops.memory import keep_freed_memory
from deepseek.optim import AdamW, Constant
from deepseek.records import Measurement, summarize

COMMAND = shlex.join(["python", "benchmarks/progressive.py", *sys.argv[1:]])
ONE_SHOT = {"one-shot": 0.0, "one-shot-tokens": 1.0}
"""How much of a student's loss is that of the text."""
PROGRESSIVE: dict[str, tuple[float, int | None]] = {
    "every-step": (0.0, None),
    "every-step-tokens": (1.0, None),
    "8-checkpoints": (0.0, 8),
    "8-checkpoints-tokens": (1.0, 8),
    "16-checkpoints-tokens": (1.0, 16),
}
"""The same, and how many states of the teacher are learned from in `2 * steps` steps."""
ALONE = "alone"
"""A student without a teacher."""
SHARES = {
    "fewer_student_steps": "fewer student steps",
    "fewer_steps_in_all": "fewer steps in all",
    "less_cpu_in_all": "less time in all",
}
SMOOTH = 3
Curve = list[tuple[int, float]]
"""Steps, and the loss behind them."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """What is learned, and what is measured on."""

    learned: Path
    held_out: torch.Tensor
    """int64 [rows, length]."""


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token a byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, eos_token="<end>")


def model_of(hidden: int, layers: int, seed: int, length: int) -> Decoder:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    heads = hidden // 32
    model = Decoder(
        DecoderConfig(
            vocab_size=257,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=32,
            intermediate_size=3 * hidden,
            max_positions=length,
            tie_embeddings=True,
        )
    )
    model.tokenizer = byte_tokenizer()
    return model.eval()


def split(folder: Path, length: int, rows: int) -> Texts:
    """Write what is learned, nine tenths of the text; keep some rows of the rest."""
    text = default_corpus().text
    border = len(text) * 9 // 10
    learned = folder / "learned.txt"
    learned.write_text(text[:border], encoding="utf-8")
    ids = torch.tensor(byte_tokenizer().encode(text[border:]))
    starts = torch.linspace(0, len(ids) - length, rows).long()
    return Texts(learned, torch.stack([ids[start : start + length] for start in starts.tolist()]))


@torch.no_grad()
def loss_of(model: Decoder, held_out: torch.Tensor) -> float:
    """Return nats of a byte that was kept back."""
    return float(model.loss(held_out, held_out))


def settings(texts: Texts, args: argparse.Namespace) -> dict[str, Any]:
    """Return what all contenders share."""
    return {
        "data": (train.Source(path=str(texts.learned)),),
        "steps": args.steps,
        "length": args.length,
        "batch": args.batch,
        "precision": "float32",
        "optimizer": AdamW(rate=args.rate, weight_decay=0.0),
        "schedule": Constant(warmup_steps=max(1, args.steps // 20)),
    }


def trained_teacher(folder: Path, seed: int, texts: Texts, args: argparse.Namespace) -> Path:
    """Return the bundle of a teacher that has learned the text."""
    stage = train.Stage(name="teacher", **settings(texts, args))
    run = train.Run(model="random", stages=(stage,), seed=seed, checkpoint_every=args.steps)
    return train.train_model(run, teacher_of(seed, args), folder / "teacher")


def teacher_of(seed: int, args: argparse.Namespace) -> Decoder:
    """Return what teachers begin as."""
    return model_of(args.teacher, 3, seed, args.length)


class Reached(Exception):
    """A student has come to the mark."""


class Student:
    """A student that is measured while it learns."""

    def __init__(self, seed: int, texts: Texts, args: argparse.Namespace) -> None:
        self.model = model_of(args.student, 2, seed + 1000, args.length)
        self._held_out, self._every = texts.held_out, args.every
        self.curve: Curve = [(0, loss_of(self.model, self._held_out))]
        self.mark = -math.inf
        """Where it stops."""
        self._step, self._start, self._measuring = 0, time.process_time(), 0.0

    def goes_on(self) -> None:
        """Count a step, measure, and raise where the mark is reached."""
        self._step += 1
        if self._step % self._every:
            return
        start = time.process_time()
        self.curve.append((self._step, loss_of(self.model, self._held_out)))
        self._measuring += time.process_time() - start
        if steps_to(self.curve, self.mark) is not None:
            raise Reached

    @property
    def cpu_s(self) -> float:
        """Seconds of the processor so far, but for the measuring."""
        return time.process_time() - self._start - self._measuring


def taught(
    name: str, start: Path, seed: int, texts: Texts, args: argparse.Namespace, mark: float
) -> Student:
    """Return a student that has learned in one way, up to the mark.

    Args:
        name: of the contender.
        start: the teacher's bundle.
        seed: of student and samples.
        texts: to learn and to measure on.
        args: the settings.
        mark: a loss.
    """
    student = Student(seed, texts, args)
    student.mark = mark
    work = Work(
        model=student.model,
        start=start,
        folder=texts.learned.with_name(name),
        seed=seed,
        goes_on=student.goes_on,
    )
    common = {**settings(texts, args), "checkpoint_every": 2 * args.steps}
    if name == ALONE:
        stage = train.Stage(name=ALONE, **{**settings(texts, args), "steps": 2 * args.steps})
        run = train.Run(model="random", stages=(stage,), seed=seed)
        with contextlib.suppress(Reached):
            train.train_model(
                run, student.model, work.folder, report=lambda progress: student.goes_on()
            )
        return student
    if name in ONE_SHOT:
        distil(Distil(**common, imitation=Imitation(tokens=ONE_SHOT[name])), work)
        return student
    tokens, checkpoints = PROGRESSIVE[name]
    common["steps"] = 2 * args.steps
    with contextlib.suppress(Reached):
        progress(Progressive(**common, tokens=tokens, checkpoints=checkpoints), work)
    return student


def smoothed(curve: Curve) -> Curve:
    """Return each point as the mean with those before it."""
    return [
        (step, sum(loss for _, loss in curve[max(0, place + 1 - SMOOTH) : place + 1]) / SMOOTH)
        for place, (step, _) in enumerate(curve)
        if place + 1 >= SMOOTH
    ]


def steps_to(curve: Curve, mark: float) -> float | None:
    """Return the steps to a loss, between two points of a curve; None where it is not reached."""
    before: tuple[int, float] | None = None
    for step, loss in smoothed(curve):
        if loss <= mark:
            if before is None:
                return float(step)
            share = (before[1] - mark) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def measured(folder: Path, seed: int, args: argparse.Namespace) -> list[Measurement]:
    """Train a seed's contenders in a folder, and return what each reached."""
    texts = split(folder, args.length, args.rows)
    about = {
        name: value
        for name, value in vars(args).items()
        if name not in ("seeds", "contenders", "json")
    }
    found: list[Measurement] = []

    def note(contender: str, name: str, value: float, unit: str) -> None:
        conditions = {**about, "seed": seed, "contender": contender}
        found.append(
            Measurement(name=name, value=value, unit=unit, conditions=conditions, command=COMMAND)
        )
        print(f"seed {seed}: {contender}: {name} {value:.4f}", file=sys.stderr)

    before = time.process_time()
    teacher = trained_teacher(folder, seed, texts, args)
    teacher_s = time.process_time() - before
    whole = hub.load(teacher, dtype="float32")
    assert isinstance(whole, Decoder)
    note("teacher", "nats_per_byte", loss_of(whole, texts.held_out), "nats")
    shots = {}
    for name in ONE_SHOT:
        student = taught(name, teacher, seed, texts, args, -math.inf)
        shots[smoothed(student.curve)[-1][1]] = student
        note(name, "nats_per_byte", smoothed(student.curve)[-1][1], "nats")
    mark = min(shots)
    shot_s = teacher_s + shots[mark].cpu_s
    start = folder / "start"
    hub.save(teacher_of(seed, args), start)
    for name in args.contenders:
        student = taught(name, start, seed, texts, args, mark)
        note(name, "nats_per_byte", smoothed(student.curve)[-1][1], "nats")
        steps = steps_to(student.curve, mark)
        note(name, "reached", float(steps is not None), "1")
        if steps is not None:
            note(name, "fewer_student_steps", 1 - steps / args.steps, "1")
            note(name, "fewer_steps_in_all", 1 - steps / (2 * args.steps), "1")
            note(name, "less_cpu_in_all", 1 - student.cpu_s / shot_s, "1")
    return found


def over_seeds(found: Sequence[Measurement]) -> list[Measurement]:
    """Return medians over seeds, with their spread."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for item in found:
        groups.setdefault((str(item.conditions["contender"]), item.name), []).append(item)
    return [
        summarize(
            f"median_{name}",
            [each.value for each in items],
            items[0].unit,
            conditions={"contender": contender, "seeds": len(items)},
            command=COMMAND,
        )
        for (contender, name), items in groups.items()
    ]


def show(found: Sequence[Measurement]) -> None:
    """Print a line for each contender."""
    first = Column("contender", no_wrap=True)
    table = Table(first, "nats a byte", *SHARES.values(), "seeds that reached the mark")
    rows: dict[str, dict[str, list[float]]] = {}
    for item in found:
        row = rows.setdefault(str(item.conditions["contender"]), {})
        row.setdefault(item.name, []).append(item.value)
    for contender, row in rows.items():
        cells = [f"{statistics.median(row['nats_per_byte']):.4f}"]
        for name in SHARES:
            values = row.get(name)
            cells.append(f"{statistics.median(values):.1%}" if values else "")
        reached = row.get("reached")
        cells.append(f"{sum(reached):.0f} of {len(reached)}" if reached else "")
        table.add_row(contender, *cells)
    Console().print(table)


def main() -> int:
    """Train, measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    known = (*PROGRESSIVE, ALONE)
    parser.add_argument("--contenders", nargs="+", choices=known, default=known)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=positive, default=400, help="of one-shot's teacher and student"
    )
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=128, help="bytes of a sample")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--teacher", type=positive, default=96, help="width, a multiple of 32")
    parser.add_argument("--student", type=positive, default=64, help="width, a multiple of 32")
    parser.add_argument("--every", type=positive, default=10, help="steps between measurements")
    parser.add_argument("--rows", type=positive, default=64, help="samples of a measurement")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    found = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found += measured(Path(folder), seed, args)
        if not args.json:
            show(found)
    if args.json:
        found += over_seeds(found)
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"progressive: {error}")
    except KeyboardInterrupt:
        sys.exit("progressive: stopped")
