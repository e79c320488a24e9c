"""Perplexity, time and bytes along a text that is longer than the model's context.

    python benchmarks/memory.py --text dracula.txt
    python benchmarks/memory.py --text dracula.txt --tokens 131072 --memory 4096 --json
    python benchmarks/memory.py --text dracula.txt --contenders whole --context 16384

Contenders, on the engine:

- memory: the first 64 tokens and the most recent ones, keys turned back (`deepseek.Memory`);
- without-first: the same, nothing kept of the start;
- read-again: no cache survives; each segment is read behind the tokens that a memory would hold
  before it, all of them anew. What a memory could reach at best, for twice the work;
- whole: everything is kept, positions go on behind the context (as long as `--whole` tokens).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek.cli.models import positive
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import default_corpus, read_corpus
from deepseek.face import load_engine
from deepseek.generate import Engine, Memory
from deepseek.generate.batch import RowPages
from deepseek.generate.engine import MAX_STEP_TOKENS
from deepseek.records import Measurement

COMMAND = shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]])

CONTENDERS = ("memory", "without-first", "read-again", "whole")

Losses = Iterator[list[float]]
"""Of the tokens of a text in order, a few at a time: nats of each given those before it."""


def read(rows: RowPages, tokens: Sequence[int], following: Sequence[int]) -> Losses:
    """Append tokens to row 0 and yield the losses of those that follow each of them."""
    start = 0
    while start < len(tokens):
        rows.make_room(0)
        stop = min(start + rows.room(0), start + MAX_STEP_TOKENS, len(tokens))
        part = tokens[start:stop]
        logits = rows.append(part, [0] * len(part), range(len(part)))
        logits -= logits.max(axis=1, keepdims=True)
        wanted = logits[np.arange(len(part)), following[start:stop]]
        yield (np.log(np.exp(logits).sum(axis=1)) - wanted).tolist()
        start = stop


def with_memory(engine: Engine, tokens: list[int], memory: Memory) -> Losses:
    """Yield losses of a text that goes through one memory."""
    rows = RowPages(engine, 1, len(tokens), memory)
    yield from read(rows, tokens[:-1], tokens[1:])


def read_again(engine: Engine, tokens: list[int], memory: Memory) -> Losses:
    """Yield losses of segments that are read behind what a memory would hold, each time anew."""
    start, stop = 0, memory.max_len
    while start < len(tokens) - 1:
        stop = min(stop, len(tokens) - 1)
        behind = min(start, memory.mem_len)
        held = tokens[: memory.first] if start else []
        window = [*held, *tokens[start - behind : stop + 1]]
        rows = RowPages(engine, 1, memory.max_len)
        losses = [each for part in read(rows, window[:-1], window[1:]) for each in part]
        yield losses[len(held) + behind :]
        start, stop = stop, stop + memory.dropped


def whole(engine: Engine, tokens: list[int]) -> Losses:
    """Yield losses of a text of which everything is kept."""
    yield from read(RowPages(engine, 1, len(tokens)), tokens[:-1], tokens[1:])


def measured(name: str, losses: Losses, piece: int, about: dict[str, object]) -> list[Measurement]:
    """Return perplexity and tokens/s of every `piece` tokens."""
    found, place = [], 0
    every = itertools.chain.from_iterable(losses)
    start = time.perf_counter()
    while len(part := list(itertools.islice(every, piece))) == piece:
        now = time.perf_counter()
        conditions = {**about, "contender": name, "from": place}
        for figure, value, unit in (
            ("perplexity", math.exp(sum(part) / piece), "1"),
            ("tokens_per_s", piece / (now - start), "tokens/s"),
        ):
            found.append(
                Measurement(
                    name=figure, value=value, unit=unit, conditions=conditions, command=COMMAND
                )
            )
        place, start = place + piece, now
    return found


def show(found: list[Measurement]) -> None:
    """Print a line for each piece of the text: perplexity and speed of every contender."""
    names = list(dict.fromkeys(str(item.conditions["contender"]) for item in found))
    cells: dict[int, dict[str, list[float]]] = {}
    for item in found:
        place = int(str(item.conditions["from"]))
        cells.setdefault(place, {}).setdefault(str(item.conditions["contender"]), []).append(
            item.value
        )
    table = Table("from token", *names)
    for place, by_name in cells.items():
        values = [by_name.get(name) for name in names]
        table.add_row(
            f"{place:,}", *("" if v is None else f"{v[0]:.2f}  ({v[1]:.0f} tok/s)" for v in values)
        )
    Console().print(table)


def main() -> int:
    """Measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scheme", default="bfloat16")
    parser.add_argument("--text", type=Path, help="(the language reference inside Python)")
    parser.add_argument("--tokens", type=positive, default=24576)
    parser.add_argument("--memory", type=positive, default=2048)
    parser.add_argument("--piece", type=positive, default=4096, help="tokens of a line")
    parser.add_argument("--whole", type=positive, default=16384, help="tokens of `whole`")
    parser.add_argument("--context", type=positive, help="stretch the model's positions to it")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    memory = Memory.of(args.memory)
    piece = min(args.piece, args.tokens)
    engine = load_engine(args.model, scheme=args.scheme, context=args.context)
    if engine is None or engine.tokenizer is None:
        must = "one that the engine knows, with a tokenizer"
        raise ConfigError(describe("model", "the benchmark of memory", must, args.model))
    corpus = default_corpus() if args.text is None else read_corpus(args.text)
    tokens = engine.tokenizer.encode(corpus.text)[: args.tokens + 1]
    if len(tokens) < args.tokens + 1:
        must = f"longer than {args.tokens} tokens"
        step = "Give a longer --text or fewer --tokens"
        raise ConfigError(
            describe("text", "the benchmark of memory", must, f"{len(tokens)} tokens", step)
        )
    contenders: dict[str, Callable[[], Losses]] = {
        "memory": lambda: with_memory(engine, tokens, memory),
        "without-first": lambda: with_memory(engine, tokens, memory.replace(first=0)),
        "read-again": lambda: read_again(engine, tokens, memory),
        "whole": lambda: whole(engine, tokens[: args.whole + 1]),
    }
    pages = RowPages(engine, 1, len(tokens), memory).pages
    about: dict[str, object] = {
        "model": args.model,
        "scheme": args.scheme,
        "text": corpus.name,
        "memory": memory.max_len,
        "context": engine.config.max_positions,
        "bytes": pages.num_bytes,
        "threads": engine.threads,
    }
    found = []
    for name in args.contenders:
        found += measured(name, contenders[name](), piece, about)
    if args.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
        print(f"bytes of a memory: {pages.num_bytes:,}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"memory: {error}")
    except KeyboardInterrupt:
        sys.exit("memory: stopped")
