"""Routed attention of the engine: what it loses, and what it saves.

    python benchmarks/routing.py quality --lengths 2048 4096 8192
    python benchmarks/routing.py speed --lengths 8192 16384 32768 65536 100000 --plot routing.svg

Quality: perplexity of documents, divergence from dense attention, copies of a passage over
distances, and needles, every token choosing as it would while it is generated; beside it the first
and the most recent tokens alone, as many as routed attention sees. Dense attention is the engine's
own in the same scheme.

Speed: attention alone (seconds of all layers while a prompt is read, choice included), reading the
prompt, and a token behind it; beside it PyTorch's `scaled_dot_product_attention`, one layer of the
same shape in bfloat16, times the layers. Lengths behind what the model was made for are for speed
alone.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from deepseek.cli.models import positive
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import copy_accuracy, default_corpus, needle, read_corpus
from deepseek.evaluate.corpus import Corpus
from deepseek.evaluate.intervals import student_quantile
from deepseek.face import load
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE, Engine, build_engine
from deepseek.generate.modules import weights_of
from deepseek.models import Decoder
from deepseek.ops.routing import BLOCK, Routing
from deepseek.ops.scheme import SCHEMES, Scheme
from deepseek.records import Measurement, Spread

DECODED = 64
"""Tokens that are timed behind a prompt."""
DISTANCES = (0.25, 0.5, 0.9)
"""From a passage to its copy, as shares of the length."""


class EngineModel:
    """An engine as what the measurements of `deepseek.evaluate` call."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokenizer, self.bundle = engine, engine.tokenizer, engine.bundle

    def __call__(self, input_ids: torch.Tensor, attention_mask: object = None) -> torch.Tensor:
        """Return the logits [1, T, vocab] of one row."""
        return torch.from_numpy(read(self.engine, input_ids[0].tolist(), every=True)[0])[None]


def read(
    engine: Engine, tokens: Sequence[int], *, every: bool = False, room: int = 0
) -> tuple[np.ndarray, Any, np.ndarray]:
    """Read a prompt; return logits (of every token or the last), its pages and their table.

    Args:
        engine: that reads.
        tokens: the prompt.
        every: whether logits of every token are wanted.
        room: tokens that will follow.
    """
    count = -(-(len(tokens) + room) // PAGE_SIZE)
    pages, table = engine.new_pages(count), np.arange(count, dtype=np.int32)[None]
    logits = []
    for start in range(0, len(tokens), MAX_STEP_TOKENS):
        part = tokens[start : start + MAX_STEP_TOKENS]
        places = np.arange(start, start + len(part), dtype=np.int32)
        wanted = range(len(part)) if every else [len(part) - 1]
        logits.append(engine.step(pages, part, places, np.zeros_like(places), table, wanted))
    return np.concatenate(logits) if every else logits[-1], pages, table


def contenders(names: Sequence[str], length: int) -> Iterator[tuple[str, Routing | None]]:
    """Yield contenders by name: dense, recent, or how often routed attention chooses."""
    for name in names:
        if name == "dense":
            yield name, None
        elif name == "recent":
            seen = Routing().blocks_seen((length - 1) // BLOCK)
            tokens = seen * BLOCK
            yield (
                name,
                Routing(recent=seen - 1, least=tokens, most=tokens, most_from=max(tokens, length)),
            )
        else:
            yield name, Routing(refresh=int(name.removeprefix("routed-")))


def new_engine(model: Decoder, options: argparse.Namespace, routing: Routing | None) -> Engine:
    """Return an engine of a model, made for the longest length too."""
    longest = max(model.config.max_positions, max(options.lengths) + DECODED + 1)
    return build_engine(
        model.config.replace(max_positions=longest),
        weights_of(model),
        Scheme.named(options.scheme),
        tokenizer=model.tokenizer,
        bundle=model.bundle,
        threads=options.threads,
        routing=routing,
    )


# Quality ---------------------------------------------------------------------------------------


def documents(tokens: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Return pieces of a text, spread evenly over it; they overlap where it is short.

    Raises:
        ConfigError: the text is shorter than one piece.
    """
    if len(tokens) < length:
        must = f"at least {length} tokens long"
        raise ConfigError(describe("text", "routing", must, f"{len(tokens)} tokens"))
    spare = len(tokens) - length
    starts = [spare * number // max(1, count - 1) for number in range(count)]
    return [list(tokens[start : start + length]) for start in starts]


@dataclasses.dataclass(frozen=True)
class Read:
    """How a document's second half was predicted."""

    loss: float
    divergence: float


def read_documents(
    engine: Engine, pieces: Sequence[Sequence[int]], dense: list[torch.Tensor]
) -> list[Read]:
    """Return how an engine predicts the second halves; the first engine's chances become those of
    `dense`."""
    found = []
    for number, piece in enumerate(pieces):
        half = len(piece) // 2
        logits = torch.from_numpy(read(engine, piece, every=True)[0])[half:-1]
        chances = logits.log_softmax(-1)
        if len(dense) == number:
            dense.append(chances.bfloat16())
        reference = dense[number].float()
        targets = torch.tensor(piece[half + 1 :])[:, None]
        loss = -chances.gather(1, targets).mean().item()
        kl = (reference.exp() * (reference - chances)).sum(-1).mean().item()
        found.append(Read(loss, kl))
    return found


def quality(options: argparse.Namespace, say: Say) -> list[Measurement]:
    """Return what each contender loses, dense attention first."""
    model = _decoder(options)
    corpus = _corpus(options.text)
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(corpus.text)
    figures = []
    for length in options.lengths:
        pieces = documents(tokens, length, options.items)
        dense: list[torch.Tensor] = []
        losses: list[float] = []
        for name, routing in contenders(("dense", *options.contenders), length):
            say(f"{length} tokens: {name}")
            engine = new_engine(model, options, routing)
            about = {"contender": name, "length": length, "scheme": options.scheme}
            about |= {"threads": options.threads, **corpus.conditions()}
            rows = read_documents(engine, pieces, dense)
            losses = losses or [row.loss for row in rows]
            figures += _document_figures(rows, losses, about)
            figures += _retrieval_figures(engine, corpus, length, options, about)
            del engine
    return figures


def _document_figures(
    rows: Sequence[Read], dense: Sequence[float], about: Mapping[str, Any]
) -> list[Measurement]:
    changes = [row.loss - loss for row, loss in zip(rows, dense, strict=True)]
    mean = statistics.fmean(changes)
    spread = None
    if len(rows) > 1:
        half = student_quantile(len(rows) - 1) * statistics.stdev(changes) / len(rows) ** 0.5
        spread = Spread(kind="ci95", low=math.exp(mean - half), high=math.exp(mean + half))
    conditions = {**about, "documents": len(rows)}
    perplexity = math.exp(statistics.fmean(row.loss for row in rows))
    divergence = statistics.fmean(row.divergence for row in rows)
    return [
        Measurement(name="perplexity", value=perplexity, unit="1", conditions=conditions),
        Measurement(
            name="perplexity_ratio",
            value=math.exp(mean),
            unit="1",
            spread=spread,
            conditions=conditions,
        ),
        Measurement(name="kl_divergence", value=divergence, unit="nats", conditions=conditions),
    ]


def _retrieval_figures(
    engine: Engine,
    corpus: Corpus,
    length: int,
    options: argparse.Namespace,
    about: Mapping[str, Any],
) -> list[Measurement]:
    model, found = EngineModel(engine), []
    for share in DISTANCES:
        distance = int(share * (length - 128))
        result = copy_accuracy(
            model, length=length, distance=distance, num_items=options.probes, text=corpus
        )
        found += result.measurements
    for keys in (1, 4):
        result = needle(model, length=length, num_keys=keys, num_items=options.probes, text=corpus)
        found += result.measurements
    return [dataclasses.replace(each, conditions={**about, **each.conditions}) for each in found]


# Speed -----------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, say: Say) -> list[Measurement]:
    """Return seconds of attention, of prompts and of tokens behind them, for each length."""
    model = _decoder(options)
    tokens = _tokens(model, options)
    figures = []
    for length in options.lengths:
        about = {"length": length, "threads": options.threads, "scheme": options.scheme}
        if not options.no_peer:
            say(f"{length} tokens: scaled_dot_product_attention")
            times = sdpa_seconds(model, length, options)
            figures.append(_seconds("attention", times, {**about, "contender": "sdpa"}))
        for name, routing in contenders(options.contenders, length):
            if name == "dense" and length > options.longest_dense:
                continue
            say(f"{length} tokens: {name}")
            engine = new_engine(model, options, routing)
            rounds = [_timed(engine, tokens[:length]) for _ in range(options.rounds)]
            where = {**about, "contender": name}
            for part, name_of in enumerate(("attention", "prefill", "decode")):
                figures.append(_seconds(name_of, [each[part] for each in rounds], where))
            del engine
    return figures + exponents(figures)


def _timed(engine: Engine, tokens: Sequence[int]) -> tuple[float, float, float]:
    """Return seconds of attention and of all while a prompt is read, and of a token behind it."""
    engine.native.is_timed = True
    before = np.array(engine.native.seconds)
    start = time.perf_counter()
    _, pages, table = read(engine, tokens, room=DECODED)
    whole = time.perf_counter() - start
    spent = np.array(engine.native.seconds) - before
    ops = [item.op for item in engine.program.instructions]
    attention = sum(s for s, op in zip(spent, ops, strict=False) if op == "attend")
    start = time.perf_counter()
    for place in range(len(tokens), len(tokens) + DECODED):
        engine.step(pages, [tokens[place % len(tokens)]], [place], [0], table, [0])
    return float(attention), whole, (time.perf_counter() - start) / DECODED


def sdpa_seconds(model: Decoder, length: int, options: argparse.Namespace) -> list[float]:
    """Return seconds that PyTorch's attention takes for all layers, from one of them."""
    config = model.config
    torch.set_num_threads(options.threads)
    drawn = [
        torch.randn(1, heads, length, config.head_dim, dtype=torch.bfloat16)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]
    times = []
    with torch.no_grad():
        for _ in range(options.rounds + 1):  # the first is for warming up
            start = time.perf_counter()
            scaled_dot_product_attention(*drawn, is_causal=True, enable_gqa=True)
            times.append((time.perf_counter() - start) * config.num_layers)
    return times[1:]


def exponents(figures: Sequence[Measurement]) -> list[Measurement]:
    """Return the slopes of log seconds over log length, of each contender with three lengths."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in figures:
        key = (each.name, str(each.conditions["contender"]))
        groups.setdefault(key, []).append(
            (math.log(float(each.conditions["length"])), math.log(each.value))  # type: ignore[arg-type]
        )
    found = []
    for (name, contender), points in groups.items():
        if len(points) < 3 or name == "decode_s":
            continue
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        where = {"contender": contender, "of": name, "points": len(points)}
        found.append(Measurement(name="exponent", value=slope, unit="1", conditions=where))
    return found


def _seconds(name: str, times: Sequence[float], about: Mapping[str, Any]) -> Measurement:
    spread = Spread(kind="range", low=min(times), high=max(times)) if len(times) > 1 else None
    value = statistics.median(times)
    return Measurement(name=f"{name}_s", value=value, unit="s", spread=spread, conditions=about)


def plot(path: Path, figures: Sequence[Measurement]) -> None:
    """Draw seconds over lengths, both by their logarithms."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = ("attention_s", "prefill_s", "decode_s")
    figure, axes = pyplot.subplots(1, len(names), figsize=(12, 4))
    for axis, name in zip(axes, names, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for each in figures:
            if each.name == name:
                at = (float(each.conditions["length"]), each.value)  # type: ignore[arg-type]
                lines.setdefault(str(each.conditions["contender"]), []).append(at)
        for contender, points in lines.items():
            axis.loglog(*zip(*points, strict=True), marker="o", label=contender)
        axis.set(title=name.replace("_s", ", seconds"), xlabel="tokens")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


# Both ------------------------------------------------------------------------------------------


def _decoder(options: argparse.Namespace) -> Decoder:
    model = load(options.model, dtype="bfloat16")
    if not isinstance(model, Decoder) or model.tokenizer is None:
        must = "a decoder with a tokenizer"
        raise ConfigError(describe("model", "routing", must, options.model))
    return model


def _corpus(files: Sequence[Path]) -> Corpus:
    if not files:
        return default_corpus()
    parts = [read_corpus(file) for file in files]
    name = "+".join(part.name for part in parts)
    return Corpus(name=name, text="\n\n".join(part.text for part in parts))


def _tokens(model: Decoder, options: argparse.Namespace) -> list[int]:
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(_corpus(options.text).text)
    return tokens * (max(options.lengths) // len(tokens) + 1)


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """Return the options that the words name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scheme", choices=SCHEMES, default="bfloat16", metavar="NAME")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["routed-1", "routed-2", "routed-4", "recent"],
        metavar="NAME",
        help="routed-N, which chooses every N tokens; recent; dense (of speed)",
    )
    parser.add_argument("--text", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--items", type=positive, default=20, help="documents of a length (20)")
    parser.add_argument("--probes", type=positive, default=8, help="copies and needles each (8)")
    parser.add_argument("--rounds", type=positive, default=3, help="of speed (3)")
    parser.add_argument("--longest-dense", type=positive, default=16384, metavar="TOKENS")
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch's attention out")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(words)


class Say:
    """Tells on standard error what is being measured."""

    def __call__(self, words: str) -> None:
        """Tell it."""
        print(words, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 2 for a user's mistake."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = read_options(words)
    command = shlex.join(["python", "benchmarks/routing.py", *words])
    try:
        found = (quality if options.what == "quality" else speed)(options, Say())
    except (DeepseekError, ValueError) as error:
        print(f"routing: {error}", file=sys.stderr)
        return 2
    found = [dataclasses.replace(each, command=command) for each in found]
    if options.plot and options.what == "speed":
        plot(options.plot, found)
    if options.json:
        print(json.dumps({"measurements": [each.to_dict() for each in found]}, indent=2))
        return 0
    for each in found:
        where = each.conditions
        told = " ".join(str(where[key]) for key in ("contender", "length", "of") if key in where)
        more = " ".join(f"{key} {where[key]}" for key in ("distance", "keys") if key in where)
        spread = each.spread
        low_high = f"  ({spread.low:.4g} to {spread.high:.4g})" if spread is not None else ""
        print(f"{told:28} {each.name:24} {more:14} {each.value:.4g} {each.unit}{low_high}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
