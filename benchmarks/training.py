"""Training throughput beside plain loops and the Trainer of transformers: same model, tokens,
threads.

    python benchmarks/training.py --rounds 3
    python benchmarks/training.py --contenders ours plain compiled --batch 4 --json

Every contender trains in a process of its own, by turns, and is timed after two steps. All compute
in bfloat16 by autocast on float32 weights, with AdamW and a gradient clipped at 1. `plain` is a
loop after nanoGPT on our modules, `compiled` the same through torch.compile, `plain transformers`
the same on transformers' model, `Trainer` transformers' own loop (it needs `accelerate`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import deepseek
from deepseek.cli.models import positive
from deepseek.hub import resolve
from deepseek.records import Measurement, summarize

LEARNING_RATE = 1e-5
WARM_STEPS, STEPS = 2, 3

Times = Iterator[float]
"""Seconds of one step after another."""


def ours(options: argparse.Namespace) -> Times:
    """Time the steps of `deepseek train`."""
    from deepseek.ops.memory import keep_freed_memory
    from deepseek.optim import AdamW, build_optimizers
    from deepseek.parallel import TreeSum, World
    from deepseek.train import Run, Source, Stage
    from deepseek.train.origin import open_model
    from deepseek.train.places import Places
    from deepseek.train.sources import Opener
    from deepseek.train.step import BatchStep, choose_parameters

    keep_freed_memory()
    stage = Stage(
        name="timed",
        data=(Source(path="python-topics"),),
        steps=WARM_STEPS + STEPS,
        length=options.length,
        batch=options.batch,
        optimizer=AdamW(rate=LEARNING_RATE),
    )
    run, world = Run(model=options.model, stages=(stage,)), World()
    model = open_model(run).train()
    with tempfile.TemporaryDirectory() as folder:
        windows = Opener.of(run, model, Places(Path(folder)), world).open(0)
        parameters = choose_parameters(model, stage.trains)
        optimizers = build_optimizers(stage.optimizer, parameters)
        step = BatchStep(
            model, parameters, optimizers, stage, windows,
            world=world, transport=TreeSum(world), seed=0,
        )  # fmt: skip
        for number in range(WARM_STEPS + STEPS):
            start = time.perf_counter()
            step.run(number, WARM_STEPS + STEPS)
            yield time.perf_counter() - start


def loop(model: torch.nn.Module, options: argparse.Namespace, *, compiles: bool) -> Times:
    """Time the steps of a plain loop."""
    run: Callable[..., Any] = torch.compile(model) if compiles else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
    )
    tokens = tokens_of(options)
    for number in range(WARM_STEPS + STEPS):
        start = time.perf_counter()
        batch = tokens[number * options.batch : (number + 1) * options.batch]
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - start


def plain(options: argparse.Namespace) -> Times:
    """Time a plain loop on our modules."""
    model = deepseek.load(options.model, dtype="float32", attention="sdpa").train()
    yield from loop(model, options, compiles=False)


def compiled(options: argparse.Namespace) -> Times:
    """Time a compiled plain loop on our modules."""
    model = deepseek.load(options.model, dtype="float32", attention="sdpa").train()
    yield from loop(model, options, compiles=True)


def transformers_model(options: argparse.Namespace) -> Any:
    """Return transformers' model of the same weights."""
    import transformers

    folder = resolve(options.model)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def plain_transformers(options: argparse.Namespace) -> Times:
    """Time a plain loop on transformers' model."""
    yield from loop(transformers_model(options), options, compiles=False)


def trainer(options: argparse.Namespace) -> Times:
    """Time the Trainer of transformers."""
    import transformers

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]

    rows = [{"input_ids": row, "labels": row} for row in tokens_of(options)]
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=WARM_STEPS + STEPS,
            learning_rate=LEARNING_RATE,
            bf16=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            optim="adamw_torch_fused",
        )
        transformers.Trainer(
            model=transformers_model(options),
            args=settings,
            train_dataset=rows,  # type: ignore[arg-type]
            callbacks=[Clock()],
        ).train()
    yield from times


CONTENDERS: dict[str, Callable[[argparse.Namespace], Times]] = {
    "ours": ours,
    "plain": plain,
    "compiled": compiled,
    "plain transformers": plain_transformers,
    "Trainer": trainer,
}


def tokens_of(options: argparse.Namespace) -> torch.Tensor:
    """Return rows of the default text [steps * batch, length]."""
    from deepseek.data import Tokenizer
    from deepseek.evaluate import default_corpus

    tokenizer = Tokenizer.from_folder(resolve(options.model))
    assert tokenizer is not None
    count = (WARM_STEPS + STEPS) * options.batch * options.length
    ids = tokenizer.encode(default_corpus().text)
    while len(ids) < count:
        ids += ids
    return torch.tensor(ids[:count]).view(-1, options.length)


def alone(name: str, options: argparse.Namespace) -> int:
    """Time one contender in this process and print its steps in seconds, and its peak memory."""
    import resource

    torch.set_num_threads(options.threads)
    times = [*CONTENDERS[name](options)][WARM_STEPS:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"step_s": times, "peak_rss_bytes": peak}))
    return 0


def measure(options: argparse.Namespace, command: str, bar: Progress) -> list[Measurement]:
    """Return tokens/s and peak memory of each contender, and ours over each of the others."""
    speeds: dict[str, list[float]] = {name: [] for name in options.contenders}
    peaks: dict[str, list[float]] = {name: [] for name in options.contenders}
    turns = [(turn, name) for turn in range(options.rounds) for name in options.contenders]
    for turn, name in bar.track(turns, description="training"):
        words = [sys.executable, __file__, "--alone", name, "--model", options.model]
        for flag in ("batch", "length", "threads"):
            words += [f"--{flag}", str(getattr(options, flag))]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"training: {name} failed in round {turn + 1}: {done.stderr.strip()[-500:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        speeds[name].append(options.batch * options.length / min(found["step_s"]))
        peaks[name].append(found["peak_rss_bytes"])
    about = {
        "model": options.model,
        "batch": options.batch,
        "length": options.length,
        "threads": options.threads,
        "precision": "bfloat16 products by autocast, float32 weights",
    }
    rest: dict[str, Any] = {"command": command}
    measured = []
    for name in options.contenders:
        conditions = {**about, "contender": name}
        for label, values, unit in (
            ("training_tokens_per_s", speeds[name], "tokens/s"),
            ("peak_rss_bytes", peaks[name], "bytes"),
        ):
            measured.append(summarize(label, values, unit, conditions=conditions, **rest))
    for name in options.contenders:
        if name != "ours" and "ours" in speeds:
            ratios = [a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)]
            conditions = {**about, "over": name}
            measured.append(summarize("ours_over", ratios, "1", conditions=conditions, **rest))
    return measured


def show(found: list[Measurement]) -> None:
    """Print a line for each figure."""
    for item in found:
        assert item.spread is not None
        who = item.conditions.get("contender") or f"over {item.conditions['over']}"
        scale = 2**20 if item.unit == "bytes" else 1
        unit = "MiB" if item.unit == "bytes" else item.unit
        low, high = item.spread.low / scale, item.spread.high / scale
        print(
            f"{item.name:24} {who:26} {item.value / scale:9.4g} {unit}  [{low:.4g} to {high:.4g}]"
        )


def main() -> int:
    """Measure, and print lines or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    usable = [name for name in CONTENDERS if name != "Trainer" or has("accelerate")]
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=usable)
    parser.add_argument("--batch", type=positive, default=8, help="rows of a step (8)")
    parser.add_argument("--length", type=positive, default=512, help="tokens of a row (512)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.alone:
        return alone(options.alone, options)
    command = shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]])
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        found = measure(options, command, bar)
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0


def has(package: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
