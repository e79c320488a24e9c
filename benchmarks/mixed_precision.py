"""Fine-tunes a model with weights, gradients and moments kept in fewer bits, beside float32.

    python benchmarks/mixed_precision.py --seeds 3
    python benchmarks/mixed_precision.py --modes float32 float8 --steps 10 --quick

For each seed every mode takes the same steps on the same rows of the default text, and is then
measured, read in float32, on rows that none has seen. The difference to float32 is paired by seed:
its interval of 95 % is Student's over the seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import deepseek
from deepseek.cli.models import positive
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import default_corpus
from deepseek.evaluate.intervals import student_quantile
from deepseek.models import Decoder
from deepseek.ops.memory import keep_freed_memory
from deepseek.optim import MixedPrecisionTrainer
from deepseek.optim.mixed_precision import TABLE
from deepseek.records import Measurement, Spread, summarize

MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"fp16_params": ["*"]},
    "bfloat16": {"bf16_params": ["*"]},
    "float8": {"fp8_params": ["*"]},
    "auto": {"fp16_params": "auto"},
}
QUICK = {"steps": 3, "seeds": 1, "length": 32, "batch": 2, "held_out": 2}
"""What `--quick` takes: it shows that all runs, no more."""
SAMPLE_TOKENS = 64
"""Of the one row that "auto" measures on."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a mode gave for one seed."""

    loss: float
    """On held-out rows, in nats, weights read in float32."""
    num_bytes: int
    """Weights, gradients and moments."""
    step_s: float
    """Median over the steps."""
    num_skipped: int
    """Steps that were not taken, as gradients overflowed."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tokens to learn from, and tokens to measure on, which no step sees."""

    learned: Tensor
    """[rows, length]."""
    held_out: Tensor
    """[rows, length], spread evenly over the text."""


def read_rows(model: Decoder, options: argparse.Namespace) -> Rows:
    """Return the rows of the default text.

    Raises:
        ConfigError: the text has too few.
    """
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(default_corpus().text)
    count = len(ids) // options.length
    rows = torch.tensor(ids[: count * options.length]).view(count, options.length)
    if count < options.held_out + options.batch * options.steps:
        must = f"less than the {count} rows of the text, with those held out"
        got = options.batch * options.steps
        raise ConfigError(describe("batch times steps", "mixed_precision", must, got))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.linspace(0, count - 1, options.held_out).long()] = True
    return Rows(learned=rows[~chosen], held_out=rows[chosen])


def batches(rows: Rows, seed: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """Yield the steps' rows, in the order of the seed: the same for every mode."""
    order = torch.randperm(len(rows.learned), generator=torch.Generator().manual_seed(seed))
    for step in range(options.steps):
        yield rows.learned[order[step * options.batch : (step + 1) * options.batch]]


def make_trainer(
    model: Decoder, mode: str, seed: int, rows: Rows, options: argparse.Namespace
) -> MixedPrecisionTrainer:
    """Return what takes the steps of a mode."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.rate, betas=(0.9, 0.95), fused=True
    )
    row = rows.learned[:1, :SAMPLE_TOKENS]
    return MixedPrecisionTrainer(
        model=model,
        optimizer=optimizer,
        seed=seed,
        sample=lambda: model.loss(row, row),
        **MODES[mode],
    )


def fine_tune(
    mode: str, seed: int, options: argparse.Namespace
) -> tuple[Outcome, MixedPrecisionTrainer]:
    """Take the steps of one mode and seed; return what came of them, and what took them."""
    model = deepseek.load(options.model, dtype="float32")
    assert isinstance(model, Decoder)
    rows, times, num_skipped = read_rows(model, options), [], 0
    trainer = make_trainer(model.train(), mode, seed, rows, options)
    for tokens in batches(rows, seed, options):
        start, scale = time.perf_counter(), trainer.loss_scale
        trainer.step(lambda tokens=tokens: model.loss(tokens, tokens))
        times.append(time.perf_counter() - start)
        num_skipped += trainer.loss_scale < scale
    num_bytes = trainer.num_bytes
    loss = held_out_loss(model, rows, options)
    return Outcome(loss, num_bytes, statistics.median(times), num_skipped), trainer


def held_out_loss(model: Decoder, rows: Rows, options: argparse.Namespace) -> float:
    """Return the mean loss of the rows that no step saw, in nats; the weights become float32."""
    model.float().eval()
    with torch.no_grad():
        found = [model.loss(part, part).item() for part in rows.held_out.split(options.batch)]
    sizes = [len(part) for part in rows.held_out.split(options.batch)]
    return sum(a * b for a, b in zip(found, sizes, strict=True)) / sum(sizes)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, Spread | None]:
    """Return the mean difference over seeds, and its interval of 95 %; None for one seed."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = student_quantile(len(differences) - 1) * error
    return mean, Spread("ci95", mean - half, mean + half)


def tell(words: str) -> None:
    """Say how far it is."""
    print(f"mixed_precision: {words}", file=sys.stderr, flush=True)


def measure(
    options: argparse.Namespace, command: str, bar: Progress
) -> tuple[list[Measurement], list[tuple[str, ...]]]:
    """Return loss, bytes and time of every mode, and the rows of what "auto" decided."""
    outcomes: dict[str, list[Outcome]] = {mode: [] for mode in options.modes}
    decided: list[tuple[str, ...]] = []
    turns = [(seed, mode) for seed in range(options.seeds) for mode in options.modes]
    for seed, mode in bar.track(turns, description="fine-tuning"):
        found, trainer = fine_tune(mode, seed, options)
        outcomes[mode].append(found)
        if mode == "auto":
            decided = trainer.table()
        tell(f"seed {seed}, {mode}: loss {found.loss:.5f}, {found.step_s:.2f} s a step")
    names = ("model", "steps", "batch", "length", "rate", "threads", "seeds", "held_out")
    about = {name: getattr(options, name) for name in names}
    rest = {"command": command}
    measured = []
    for mode, found in outcomes.items():
        measured += figures(mode, found, outcomes.get("float32"), about, rest)
    return measured, decided


def figures(
    mode: str,
    found: list[Outcome],
    whole: list[Outcome] | None,
    about: dict[str, Any],
    rest: dict[str, Any],
) -> list[Measurement]:
    """Return the measurements of one mode, beside those of float32."""
    said: dict[str, Any] = {"conditions": {**about, "mode": mode}, **rest}
    losses = [each.loss for each in found]
    measured = [
        Measurement(
            name="held_out_loss",
            value=statistics.fmean(losses),
            unit="nats",
            spread=Spread("min-max", min(losses), max(losses)),
            **said,
        ),
        Measurement(name="training_bytes", value=found[0].num_bytes, unit="bytes", **said),
        summarize("skipped_steps", [each.num_skipped for each in found], "1", **said),
        summarize("step_s", [each.step_s for each in found], "s", **said),
    ]
    if whole is not None and mode != "float32":
        mean, spread = paired(losses, [each.loss for each in whole])
        saved = 1 - found[0].num_bytes / whole[0].num_bytes
        measured += [
            Measurement(name="loss_difference", value=mean, unit="nats", spread=spread, **said),
            Measurement(name="saved_share", value=saved, unit="1", **said),
        ]
    return measured


def show(found: list[Measurement], decided: list[tuple[str, ...]]) -> None:
    """Print a line for each figure, and what "auto" decided."""
    for row in [TABLE, *decided] if decided else []:
        print("  ".join(row))
    for item in found:
        spread = item.spread and f"[{item.spread.low:.5g} to {item.spread.high:.5g}]"
        mode = item.conditions["mode"]
        print(f"{item.name:16} {mode:10} {item.value:12.6g} {item.unit:6} {spread or ''}")


def read_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES])
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--seeds", type=positive, default=3, help="of the order of rows (3)")
    parser.add_argument("--batch", type=positive, default=4, help="rows of a step (4)")
    parser.add_argument("--length", type=positive, default=128, help="tokens of a row (128)")
    parser.add_argument("--held-out", type=positive, default=32, help="rows to measure on (32)")
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate (2e-5)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    return options


def main() -> int:
    """Measure, and print lines or one JSON object."""
    options = read_options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    command = shlex.join(["python", "benchmarks/mixed_precision.py", *sys.argv[1:]])
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            found, decided = measure(options, command, bar)
    except DeepseekError as error:
        print(f"mixed_precision: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found, decided)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
