"""Train a model in stages; stop it whenever you like, the same command goes on."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.models import positive
from deepseek.cli.output import Output, number
from deepseek.cli.trackers import Tracker, add_tracker_arguments, tracker_words, tracking
from deepseek.errors import VerifyError, describe

if TYPE_CHECKING:
    from deepseek.parallel import World
    from deepseek.records import Measurement
    from deepseek.train import Progress, Run

EXAMPLE = "deepseek train examples/train.yaml --out runs/first"
_LINE_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek train`."""
    parser.add_argument("run", metavar="RUN", help=".yaml, or .py with a function run()")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the run lives; it goes on from there"
    )
    parser.add_argument("--workers", type=positive, default=1, help="processes (1)")
    parser.add_argument(
        "--threads", type=positive, help="threads a worker computes with (the cores, shared)"
    )
    parser.add_argument(
        "--prove", action="store_true", help="train nothing: check what the ledger says was read"
    )
    add_tracker_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Train, or prove what was read."""
    if args.prove:
        return _prove(args, out)
    if args.workers > 1:
        return launch(["train", args.run, "--out", args.out, *tracker_words(args)], args)
    from deepseek.parallel import joined_world
    from deepseek.train import read_run

    asked = read_run(args.run)
    with joined_world() as world, contextlib.ExitStack() as stack:
        trackers = stack.enter_context(tracking(args, out.note)) if world.is_first else ()
        folder = train_here(asked, args, out, world, trackers)
    return _finish(folder, args, out) if world.is_first else 0


def train_here(
    asked: Run,
    args: argparse.Namespace,
    out: Output,
    world: World,
    trackers: Sequence[Tracker] = (),
) -> Path:
    """Train in this process, one of a world, and return the last bundle's folder.

    Args:
        asked: the run.
        args: with `out` and `threads`.
        out: told by the first worker alone.
        world: the workers.
        trackers: told of each step too.
    """
    from deepseek.train import train

    if world.is_first:
        fetch(asked, out)
    world.barrier()
    set_threads(args.threads, world)
    told = out if world.is_first else Output(as_json=True)
    slow = _stages_of_slow_products(asked)
    with saying_that_it_is_saved(told, world), _reporting(told, world) as (say, preparing):

        def report(progress: Progress) -> None:
            if progress.stage in slow:
                slow.remove(progress.stage)
                told.note(
                    f"{progress.stage}: this processor has no bfloat16 products; "
                    "they are computed in float32"
                )
            for each in (say, *trackers):
                each(progress)

        return train(asked, args.out, world=world, report=report, preparing=preparing)


def _stages_of_slow_products(asked: Run) -> set[str]:
    """Return the stages that ask for bfloat16 products where the processor has none."""
    import torch

    from deepseek.ops.hardware import computes_bf16

    if computes_bf16(torch.device("cpu")):
        return set()
    return {stage.name for stage in asked.stages if stage.precision == "bfloat16"}


@contextlib.contextmanager
def saying_that_it_is_saved(out: Output, world: World | None = None) -> Iterator[None]:
    """Say, where a signal stops what runs inside, that it goes on from there."""
    from deepseek.train import Interrupted

    try:
        yield
    except Interrupted:
        if world is None or world.is_first:
            out.note("stopped, and saved. The same command goes on from here.")
        raise


def _finish(folder: Path, args: argparse.Namespace, out: Output) -> int:
    from deepseek.hub import Bundle
    from deepseek.train.summary import summarize_run

    found = [*summarize_run(Path(args.out)), *Bundle.open(folder).card.measurements]
    out.measurements(str(args.out), found)
    report = _write_report(Path(args.out), found)
    out.say(f"the model is in {folder}")
    if report is not None:
        out.say(f"plots are in {report}")
    result = {"out": str(args.out), "bundle": str(folder), "report": report and str(report)}
    return out.finish(result, found)


def _prove(args: argparse.Namespace, out: Output) -> int:
    from deepseek.train import prove_run

    stages, workers = prove_run(args.out)
    out.table(
        f"{args.out}: {len(workers)} starts, workers of each: {', '.join(map(str, workers))}",
        ("stage", "steps", "samples", "each once, in order"),
        [
            (
                each.name,
                str(each.num_steps),
                str(each.num_samples),
                "no" if each.problems else "yes",
            )
            for each in stages
        ],
    )
    problems = [f"{each.name}: {line}" for each in stages for line in each.problems]
    for line in problems:
        out.note(line)
    if problems:
        must = "each sample once an epoch, in the order of the stage"
        raise VerifyError(describe("ledger", args.out, must, problems[0]))
    facts = [
        {"stage": each.name, "steps": each.num_steps, "samples": each.num_samples}
        for each in stages
    ]
    return out.finish({"out": args.out, "workers": workers, "stages": facts})


def launch(words: Sequence[str], args: argparse.Namespace) -> int:
    """Run a verb in `--workers` processes that find each other, and return their exit code.

    Args:
        words: the verb and its arguments, without those of the workers.
        args: with `workers`, `threads` and `json`.
    """
    from deepseek.parallel import run_workers

    words = [sys.executable, "-m", "deepseek", *words]
    words += ["--threads", str(args.threads)] if args.threads else []
    words += ["--json"] if args.json else []
    return run_workers(words, args.workers)


def set_threads(asked: int | None, world: World) -> None:
    """Compute with so many threads; None for this process' share of the cores."""
    import torch

    from deepseek.ops.cpu import default_threads

    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    torch.set_num_threads(asked or max(1, default_threads() // local))


def fetch(asked: Run, out: Output) -> None:
    """Pull the models of a run that are known and not here."""
    from deepseek.cli.models import ready

    for name in (asked.model, asked.tokenizer, asked.teacher):
        if name is not None:
            ready(name, out)


class _Lines:
    """Tells of steps where there is no terminal: a line now and then."""

    def __init__(self, out: Output) -> None:
        self._out, self._last = out, 0.0

    def say(self, words: str, share: float) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_S or share >= 1.0:
            self._last = now
            self._out.note(words)


_Told = tuple["Callable[[Progress], None]", "Callable[[str, float], None]"]


@contextlib.contextmanager
def telling(out: Output) -> Iterator[Callable[[str, float], None]]:
    """Yield what long work reports to: a bar on a terminal, lines now and then elsewhere."""
    if sys.stderr.isatty():
        with out.progress() as bar:
            yield bar
    else:
        yield _Lines(out).say


@contextlib.contextmanager
def _reporting(out: Output, world: World) -> Iterator[_Told]:
    """Yield what is told of each step and of long work before the first; nothing beside the first
    worker."""
    if not world.is_first:
        yield (lambda progress: None), (lambda words, share: None)
        return
    with telling(out) as say:
        yield (lambda progress: say(_words(progress), progress.step / progress.num_steps)), say


def _words(progress: Progress) -> str:
    return (
        f"{progress.stage} {progress.step}/{progress.num_steps}  loss {progress.loss:.4f}  "
        f"{number(progress.tokens_per_s)} tokens/s  {100 * progress.mfu:.0f} % of the peak  "
        f"{_span(progress.left_s)} left"
    )


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _write_report(folder: Path, found: Sequence[Measurement]) -> Path | None:
    """Write the run's page and return its place; None where the plots cannot be drawn."""
    from deepseek.cli.report import Curves, Section, write_report
    from deepseek.train.summary import by_stage, read_metrics

    if importlib.util.find_spec("matplotlib") is None:
        return None
    stages = by_stage(read_metrics(folder))
    borders = tuple(steps[0]["total_step"] for steps in list(stages.values())[1:])
    charts = []
    for name, title, unit in (
        ("loss", "loss of each step", "nats"),
        ("rate", "learning rate", "1"),
        ("tokens_per_s", "speed", "tokens/s"),
    ):
        lines = {
            stage: ([s["total_step"] for s in steps], [s[name] for s in steps])
            for stage, steps in stages.items()
        }
        charts.append(Curves(title=title, across="step", unit=unit, lines=lines, borders=borders))
    words = (folder / "run.json").read_text(encoding="utf-8")
    section = Section(title="The run", words=words, measurements=tuple(found), charts=tuple(charts))
    path = folder / "report.html"
    write_report(path, f"deepseek train: {folder.name}", [section])
    return path
