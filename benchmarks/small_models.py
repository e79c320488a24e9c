"""Small models of bytes trained here from nothing, alike but for their attention and positions.

    python benchmarks/small_models.py --text tinyshakespeare.txt --out runs/small
    python benchmarks/small_models.py --models dense routed --seeds 0 1 2 --json

Each learns the same samples: text in which records of random bytes above ASCII stand three times
each, so that what follows a record's first bytes is known from where it stood before, and from
nowhere else. Measured on text that was kept back, at the length of training, twice and four times
it: nats of a byte of the text's last quarter, and how many bytes of a record are right whose only
other place is at the start of the sample. Rotary positions are measured as they come and stretched
by YaRN; a model in the folder `--out` is not trained again.

Models: dense; routed (every layer chooses its blocks, in training too); pattern (as many blocks,
chosen by place alone); alibi (dense with distances in place of rotations); alibi-routed; gated (a
gate on each attention head); gated-sparse (the mean gate is lowered too). Of those with gates also:
heads that are closed at thresholds, and what they cost and save in seconds of the processor on the
engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deepseek import hub
from deepseek.cli.models import positive
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import default_corpus, read_corpus
from deepseek.generate.batch import RowPages
from deepseek.generate.engine import MAX_STEP_TOKENS
from deepseek.generate.modules import engine_of
from deepseek.models import Decoder, DecoderConfig, GateConfig, GateWatch, Pattern, add_gates
from deepseek.models.planner import Planner
from deepseek.models.routed import RoutedPlanner
from deepseek.models.static import StaticPlanner
from deepseek.models.stretch import stretched
from deepseek.ops.memory import keep_freed_memory
from deepseek.ops.routing import Routing
from deepseek.records import Measurement

COMMAND = shlex.join(["python", "benchmarks/small_models.py", *sys.argv[1:]])
MODELS = ("dense", "routed", "pattern", "alibi", "alibi-routed", "gated", "gated-sparse")
THRESHOLDS = (0.0, 0.05, 0.1, 0.2)
GATE_PENALTY = 0.05

RECORD = 32
"""Bytes of a record."""
CUE = 8
"""Of them those that tell which one it is."""
COPIES = 3
BYTES_PER_RECORD = 256
"""A sample has a record for so many of its bytes."""

ROUTING = Routing(refresh=16, recent=2, share=0.25, least=256, most=1024, most_from=4096)
"""A quarter of the blocks."""
PATTERN = Pattern(first=1, recent=2, sparsity=0.85)
"""About as many."""

Bytes = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Bytes, and what they are."""

    ids: Bytes
    is_text: NDArray[np.bool_]


def records_in_text(text: Bytes, length: int, rng: np.random.Generator) -> Sample:
    """Return a stretch of text of so many bytes, records among it."""
    count = max(1, length // BYTES_PER_RECORD)
    records = rng.integers(128, 256, (count, RECORD), dtype=np.uint8)
    order = rng.permutation(np.repeat(np.arange(count), COPIES))
    return _between(text, length, [records[at] for at in order], rng)


def record_far_away(text: Bytes, length: int, rng: np.random.Generator) -> Sample:
    """Return a sample at whose end a record stands that else stands only at its start."""
    inner = records_in_text(text, length - 2 * RECORD, rng)
    wanted = rng.integers(ord("a"), ord("z") + 1, RECORD, dtype=np.uint8)
    no_text = np.zeros(RECORD, dtype=np.bool_)
    return Sample(
        np.concatenate([wanted, inner.ids, wanted]),
        np.concatenate([no_text, inner.is_text, no_text]),
    )


def _between(text: Bytes, length: int, records: list[Bytes], rng: np.random.Generator) -> Sample:
    num_text = length - RECORD * len(records)
    start = int(rng.integers(0, len(text) - num_text))
    cuts = np.sort(rng.integers(0, num_text + 1, len(records)))
    pieces = np.split(text[start : start + num_text], cuts)
    parts, marks = [pieces[0]], [np.ones(len(pieces[0]), np.bool_)]
    for record, piece in zip(records, pieces[1:], strict=True):
        parts += [record, piece]
        marks += [np.zeros(RECORD, np.bool_), np.ones(len(piece), np.bool_)]
    return Sample(np.concatenate(parts), np.concatenate(marks))


def config_of(name: str, length: int) -> DecoderConfig:
    """Return the config of a model: 0.9 million weights."""
    return DecoderConfig(
        family="deepseek_stack",
        vocab_size=256,
        hidden_size=128,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=384,
        max_positions=length,
        tie_embeddings=True,
        positions="alibi" if name.startswith("alibi") else "rope",
        gates=GateConfig() if name.startswith("gated") else None,
    )


def planner_of(name: str, config: DecoderConfig) -> Planner | None:
    """Return what decides what a model sees."""
    if name.endswith("routed"):
        return RoutedPlanner(config, ROUTING)
    return StaticPlanner(PATTERN) if name == "pattern" else None


def trained(name: str, seed: int, text: Bytes, args: argparse.Namespace) -> Decoder:
    """Return a model, from the folder if it is there."""
    settings = f"{args.steps}x{args.batch}x{args.length}-{args.rate:g}"
    folder = args.out / f"{name}-{seed}-{settings}" if args.out else None
    if folder is not None and folder.is_dir():
        model = hub.load(folder, dtype="float32")
        assert isinstance(model, Decoder)
        return model
    torch.manual_seed(seed)
    config = config_of(name, args.length)
    model = Decoder(config, planner=planner_of(name, config))
    learn(model, text, seed, args, name)
    if folder is not None:
        hub.save(model, folder)
    return model


def learn(model: Decoder, text: Bytes, seed: int, args: argparse.Namespace, name: str) -> None:
    """Train a model by AdamW, its rate warmed up and then lowered by a cosine."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        ),
    )
    start = time.perf_counter()
    for step in range(args.steps):
        samples = [records_in_text(text, args.length, rng).ids for _ in range(args.batch)]
        ids = torch.from_numpy(np.stack(samples)).long()
        optimizer.zero_grad()
        if name == "gated-sparse":
            with GateWatch(model) as watch:
                loss = model.loss(ids, ids)
            (loss + GATE_PENALTY * watch.by_token().mean()).backward()
        else:
            loss = model.loss(ids, ids)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            left = (time.perf_counter() - start) * (args.steps / (step + 1) - 1)
            words = f"{name}, seed {seed}: step {step + 1}/{args.steps}, loss {loss.item():.3f}"
            print(f"{words}, {left:.0f} s left", file=sys.stderr)


def of_gates(model: Decoder, text: Bytes, args: argparse.Namespace) -> list[dict[str, float]]:
    """Return, at each threshold, what a model with gates can, how many heads are closed, and the
    seconds of the processor for a token of 2048 on the engine."""
    found = []
    ids = text[:2048].tolist()
    for threshold in THRESHOLDS:
        add_gates(model, GateConfig(threshold=threshold))
        figures = judged(model, text, args.length, args.samples)
        engine = engine_of(model)
        assert engine is not None
        rows = RowPages(engine, 1, len(ids))
        start = time.process_time()
        for at in range(0, len(ids), MAX_STEP_TOKENS):
            part = ids[at : at + MAX_STEP_TOKENS]
            rows.append(part, [0] * len(part), [len(part) - 1])
        figures["cpu_s_per_token"] = (time.process_time() - start) / len(ids)
        figures["closed_heads"] = engine.head_count.share
        found.append({"threshold": threshold, **figures})
    return found


def longer(model: Decoder, name: str, context: int) -> Decoder:
    """Return the model with its positions stretched."""
    config = stretched(model.config, context)
    other = Decoder(config, planner=planner_of(name, config))
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def judged(model: Decoder, text: Bytes, length: int, samples: int) -> dict[str, float]:
    """Return nats of the text's bytes in the last quarter, and how much of the record is right."""
    rng = np.random.default_rng(length)
    nats, rights = [], []
    for _ in range(samples):
        sample = record_far_away(text, length, rng)
        ids = torch.from_numpy(sample.ids).long()[None]
        chances = model(ids).logits[0, :-1].log_softmax(-1)
        is_scored = torch.from_numpy(sample.is_text[1:].copy())
        is_scored[: 3 * length // 4] = False
        nats.append(_nats(chances, ids[0, 1:])[is_scored].mean().item())
        answer = slice(CUE - RECORD, None)
        right = chances[answer].argmax(-1) == ids[0, 1:][answer]
        rights.append(right.float().mean().item())
    return {"nats_per_byte": sum(nats) / samples, "record_right": sum(rights) / samples}


def _nats(chances: Tensor, following: Tensor) -> Tensor:
    return -chances.gather(1, following[:, None])[:, 0]


UNITS = {"nats_per_byte": "nats", "cpu_s_per_token": "s"}


def measured(
    name: str, seed: int, texts: tuple[Bytes, Bytes], args: argparse.Namespace
) -> list[Measurement]:
    """Train a model if need be, and return what it can at each length, or at each threshold."""
    model = trained(name, seed, texts[0], args).eval()
    model.planner = planner_of(name, model.config)
    about: dict[str, object] = {"model": name, "seed": seed, "trained_at": args.length}
    about |= {each: getattr(args, each) for each in ("steps", "batch", "rate", "samples")}
    found = []

    def note(figures: dict[str, float], **more: object) -> None:
        for figure, value in figures.items():
            unit, conditions = UNITS.get(figure, "1"), {**about, **more}
            found.append(
                Measurement(
                    name=figure, value=value, unit=unit, conditions=conditions, command=COMMAND
                )
            )

    for times in (1, 2, 4):
        length = times * args.length
        kinds = {model.config.positions: model}
        if times > 1 and model.config.positions == "rope":
            kinds["yarn"] = longer(model, name, length).eval()
        for positions, judge in kinds.items():
            figures = judged(judge, texts[1], length, args.samples)
            note(figures, length=length, positions=positions)
    if model.config.gates is not None:
        for figures in of_gates(model, texts[1], args):
            threshold = figures.pop("threshold")
            note(figures, length=args.length, positions="rope", threshold=threshold)
    return found


def show(found: list[Measurement]) -> None:
    """Print a line for each model, seed, length, positions and threshold."""
    heads = ("model", "bytes", "positions", "closes below", "nats", "record", "closed", "cpu µs")
    table = Table(*heads)
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for item in found:
        about = item.conditions
        places = (str(about[each]) for each in ("length", "positions"))
        key = (f"{about['model']} {about['seed']}", *places, str(about.get("threshold", "")))
        rows.setdefault(key, {})[item.name] = item.value
    for key, figures in rows.items():
        nats, right = figures["nats_per_byte"], figures["record_right"]
        cells = [*key, f"{nats:.4f}", f"{right:.1%}"]
        if "closed_heads" in figures:
            cells += [f"{figures['closed_heads']:.1%}", f"{1e6 * figures['cpu_s_per_token']:.1f}"]
        table.add_row(*cells)
    Console().print(table)


def main() -> int:
    """Train, measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--text", type=Path, help="(the language reference inside Python)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=1024, help="bytes of a sample")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--samples", type=positive, default=32, help="of a measurement")
    parser.add_argument("--out", type=Path, help="folder that keeps the models")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    corpus = default_corpus() if args.text is None else read_corpus(args.text)
    text = np.frombuffer(corpus.text.encode(), dtype=np.uint8)
    border = len(text) * 9 // 10
    if len(text) - border < 8 * args.length:
        must = f"at least {80 * args.length:,} bytes long"
        raise ConfigError(describe("text", "the benchmark of small models", must, len(text)))
    found = []
    for seed in args.seeds:
        for name in args.models:
            found += measured(name, seed, (text[:border], text[border:]), args)
            if not args.json:
                show(found)
    if args.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"small_models: {error}")
    except KeyboardInterrupt:
        sys.exit("small_models: stopped; what was trained stands in --out")
