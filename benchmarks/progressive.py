"""Progressive distillation against one-shot distillation: steps to the same loss.

    python benchmarks/progressive.py --seeds 0 1 2
    python benchmarks/progressive.py --seeds 0 1 2 --steps 1000 --json

Models of bytes, trained here from nothing on the text inside Python, with the same samples in the
same order: a teacher, and students that begin alike. One-shot: the teacher is trained to its end,
then a student learns from it. Progressive: another teacher of the same beginning is trained, and
in the same steps a student learns from it as it is in each of them, or from so many checkpoints of
it. The mark is the loss, in nats of a byte of text that was kept back, that the one-shot student
has at its end; a loss is read as the mean of the newest three points of a curve.

Told for each seed: the student's steps to the mark, as a share fewer than one-shot's; and the same
where the steps that the teacher is trained before count too, which progressive distillation does
not have. A mark that is not reached is told as such: the share is then that of all steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import decoders, models, pre_tokenizers

from deepseek import hub, train
from deepseek.cli.models import positive
from deepseek.compress import Work
from deepseek.compress.distil import Distil, Progressive, distil, progress
from deepseek.data import Tokenizer
from deepseek.errors import DeepseekError
from deepseek.evaluate import default_corpus
from deepseek.models import Decoder, DecoderConfig
from deepseek.ops.memory import keep_freed_memory
from deepseek.optim import AdamW, Constant
from deepseek.records import Measurement, summarize

COMMAND = shlex.join(["python", "benchmarks/progressive.py", *sys.argv[1:]])
CHECKPOINTS: dict[str, int | None] = {"progressive": None, "progressive-4": 4}
"""Contenders, and how many states of the teacher each learns from."""
ONE_SHOT = "one-shot"
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


def trained_teacher(folder: Path, seed: int, texts: Texts, args: argparse.Namespace) -> Path:
    """Return the bundle of a teacher that has learned the text."""
    stage = train.Stage(
        name="teacher", data=(train.Source(path=str(texts.learned)),), **settings(args)
    )
    run = train.Run(model="random", stages=(stage,), seed=seed, checkpoint_every=args.steps)
    return train.train_model(run, model_of(args.teacher, 4, seed, args.length), folder / "teacher")


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Return what all contenders share."""
    return {
        "steps": args.steps,
        "length": args.length,
        "batch": args.batch,
        "precision": "float32",
        "optimizer": AdamW(rate=args.rate, weight_decay=0.0),
        "schedule": Constant(warmup_steps=max(1, args.steps // 20)),
    }


def curve_of(
    name: str, start: Path, folder: Path, seed: int, texts: Texts, args: argparse.Namespace
) -> Curve:
    """Return a student's losses on the way, learning in one way."""
    student = model_of(args.student, 2, seed + 1000, args.length)
    curve: Curve = [(0, loss_of(student, texts.held_out))]
    step = 0

    def goes_on() -> None:
        nonlocal step
        step += 1
        if step % args.every == 0:
            curve.append((step, loss_of(student, texts.held_out)))
            if not args.json and step % (10 * args.every) == 0:
                print(f"{name}, seed {seed}: step {step}, {curve[-1][1]:.4f}", file=sys.stderr)

    work = Work(model=student, start=start, folder=folder / name, seed=seed, goes_on=goes_on)
    common = {**settings(args), "checkpoint_every": args.steps}
    common["data"] = (train.Source(path=str(texts.learned)),)
    if name == ONE_SHOT:
        distil(Distil(**common), work)  # type: ignore[arg-type]
    else:
        progress(Progressive(checkpoints=CHECKPOINTS[name], **common), work)  # type: ignore[arg-type]
    return curve


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
    start = folder / "start"
    hub.save(model_of(args.teacher, 4, seed, args.length), start)
    teacher = trained_teacher(folder, seed, texts, args)
    shot = curve_of(ONE_SHOT, teacher, folder, seed, texts, args)
    mark = smoothed(shot)[-1][1]
    about: dict[str, object] = {"seed": seed, "steps": args.steps, "batch": args.batch}
    about |= {"length": args.length, "rate": args.rate, "teacher_width": args.teacher}
    about |= {"student_width": args.student}
    found = []

    def note(contender: str, name: str, value: float, unit: str, **more: object) -> None:
        conditions = {**about, "contender": contender, **more}
        found.append(
            Measurement(name=name, value=value, unit=unit, conditions=conditions, command=COMMAND)
        )

    whole = hub.load(teacher, dtype="float32")
    assert isinstance(whole, Decoder)
    note("teacher", "nats_per_byte", loss_of(whole, texts.held_out), "nats")
    note(ONE_SHOT, "nats_per_byte", mark, "nats")
    for name in CHECKPOINTS:
        curve = curve_of(name, start, folder, seed, texts, args)
        note(name, "nats_per_byte", smoothed(curve)[-1][1], "nats")
        taken = steps_to(curve, mark)
        steps = float(args.steps) if taken is None else taken
        reached = {"mark": mark, "is_reached": taken is not None}
        note(name, "fewer_student_steps", 1 - steps / args.steps, "1", **reached)
        note(name, "fewer_steps_in_all", 1 - steps / (2 * args.steps), "1", **reached)
    return found


def over_seeds(found: Sequence[Measurement]) -> list[Measurement]:
    """Return medians over seeds, with their spread."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for item in found:
        groups.setdefault((str(item.conditions["contender"]), item.name), []).append(item)
    medians = []
    for (contender, name), items in groups.items():
        conditions: dict[str, object] = {"contender": contender, "seeds": len(items)}
        if "is_reached" in items[0].conditions:
            conditions["reached"] = sum(bool(each.conditions["is_reached"]) for each in items)
        values = [each.value for each in items]
        medians.append(summarize(f"median_{name}", values, items[0].unit, conditions=conditions))
    return medians


def show(found: Sequence[Measurement]) -> None:
    """Print a line for each contender."""
    table = Table(
        "contender", "nats a byte", "fewer student steps", "fewer steps in all", "reached"
    )
    rows: dict[str, dict[str, Measurement]] = {}
    for item in over_seeds(found):
        rows.setdefault(str(item.conditions["contender"]), {})[item.name] = item
    for contender, items in rows.items():
        cells = [f"{items['median_nats_per_byte'].value:.4f}"]
        for name in ("median_fewer_student_steps", "median_fewer_steps_in_all"):
            cells.append(f"{items[name].value:.1%}" if name in items else "")
        last = items.get("median_fewer_student_steps")
        if last is not None:
            cells.append(f"{last.conditions['reached']} of {last.conditions['seeds']}")
        table.add_row(contender, *cells)
    Console().print(table)


def main() -> int:
    """Train, measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=400, help="of each contender")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--length", type=positive, default=128, help="bytes of a sample")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--teacher", type=positive, default=128, help="width, a multiple of 32")
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
