"""What spans and segments lose: perplexity and copies, beside dense attention and windows.

    python benchmarks/spans.py --text dracula.txt
    python benchmarks/spans.py --text dracula.txt --length 4096 --shares 0.9 0.98 --json
    python benchmarks/spans.py --text dracula.txt --length 16384 --context 16384

Every contender runs through the modules. Spans are measured on the first half of the text, all else
on the second. Contenders:

- dense: everything is seen;
- spans-S: each head as far back as holds the share S of its attention, and the first 64 tokens;
- segments: a query's own segment, the one before, the first 32 tokens of all others, the first
  block;
- segments-unlinked: the same without the beginnings of the others;
- window-as-C: for every head the same window, and the first 64 tokens; as many tokens are seen as
  of C on average.

Perplexity is that of the second halves of documents. A copy is a passage that is repeated at a
distance; its accuracy is the share of tokens that greedy decoding would write.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import deepseek
from deepseek.cli.models import positive
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import (
    Corpus,
    attention_spans,
    copy_accuracy,
    default_corpus,
    read_corpus,
)
from deepseek.evaluate.intervals import student_quantile
from deepseek.evaluate.sliding_perplexity import token_losses
from deepseek.models import (
    Boundaries,
    Decoder,
    DecoderConfig,
    Planner,
    SegmentPlanner,
    Segments,
    SpanPlanner,
    Spans,
)
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV
from deepseek.records import Measurement, Spread

DISTANCES = (0.25, 0.5, 0.9)
"""From a passage to its copy, as shares of the length."""
PASSAGE = 128
"""Tokens of a passage."""


class Counting:
    """A planner as it is, and how many tokens are seen and listed by what it plans."""

    def __init__(self, planner: Planner | None) -> None:
        self.planner = planner
        self.seen: list[float] = []
        self.listed: list[float] = []

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return the planner's table."""
        table = None
        if self.planner is not None:
            table = self.planner.plan(layer, queries, kv, layout)
        if table is None:
            self.seen.append((layout.num_slots + 1) / 2)
            self.listed.append(float(layout.num_slots))
            return None
        heads, kv_heads = queries.shape[1], kv.dense(layout.num_slots)[0].shape[1]
        seen = table.visible(layout, heads, kv_heads)
        self.seen.append(float(seen.sum(-1).double().mean()))
        self.listed.append(float(table.counts.double().mean()) * table.block_size)
        return table


def window_of(config: DecoderConfig, seen: float, length: int) -> SpanPlanner:
    """Return equal spans by which as many tokens of `length` are seen on average."""

    def spans(reach: int) -> Spans:
        return Spans(reach=((reach,) * config.num_heads,) * config.num_layers)

    low, high = 1, length
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if spans(middle).mean_seen(length) < seen else (low, middle)
    return SpanPlanner(spans(low))


def documents(tokens: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Return pieces of a text, spread evenly over it.

    Raises:
        ConfigError: the text is shorter than one piece.
    """
    spare = len(tokens) - length
    if spare < 0:
        must = f"at least {2 * length} tokens long"
        raise ConfigError(
            describe("text", "the benchmark of spans", must, f"{len(tokens)} in half")
        )
    starts = [spare * number // max(1, count - 1) for number in range(count)]
    return [list(tokens[start : start + length]) for start in starts]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model, and what it is measured on."""

    model: Decoder
    corpus: Corpus
    pieces: list[list[int]]
    probes: int
    about: Mapping[str, Any]
    bar: Progress

    def losses(self) -> list[float]:
        """Return the mean loss of each document's second half, in nats."""
        length = len(self.pieces[0])
        return [
            float(token_losses(self.model, piece, length, length - 1)[length // 2 :].mean())
            for piece in self.bar.track(self.pieces, description="documents")
        ]

    def cost(self, planner: Planner | None) -> tuple[float, float]:
        """Return how many tokens are seen, and how many are in listed blocks, on average."""
        self.model.planner = counting = Counting(planner)
        with torch.inference_mode():
            self.model.final_states(torch.tensor(self.pieces[:1]))
        self.model.planner = planner
        return statistics.fmean(counting.seen), statistics.fmean(counting.listed)

    def measured(
        self, name: str, planner: Planner | None, dense: Sequence[float] | None
    ) -> tuple[list[Measurement], list[float]]:
        """Return the figures of a contender, and its loss in each document.

        Args:
            name: of the contender.
            planner: its planner.
            dense: losses of dense attention; None for its own.
        """
        about = {**self.about, "contender": name, "documents": len(self.pieces)}
        self.bar.console.print(name)
        seen, listed = self.cost(planner)
        losses = self.losses()
        changes = [own - peer for own, peer in zip(losses, dense or losses, strict=True)]
        figures = [
            ("perplexity", math.exp(statistics.fmean(losses)), "1", None),
            ("perplexity_ratio", math.exp(statistics.fmean(changes)), "1", interval(changes)),
            ("tokens_seen", seen, "tokens", None),
            ("tokens_listed", listed, "tokens", None),
        ]
        found = [
            Measurement(name=figure, value=value, unit=unit, spread=spread, conditions=about)
            for figure, value, unit, spread in figures
        ]
        length = len(self.pieces[0])
        for share in self.bar.track(DISTANCES, description=f"{name}: copies"):
            copies = copy_accuracy(
                self.model,
                length=length,
                distance=max(PASSAGE, int(share * (length - PASSAGE))),
                num_passage_tokens=PASSAGE,
                num_items=self.probes,
                text=self.corpus,
            ).measurements
            found += [
                dataclasses.replace(each, conditions={**about, **each.conditions}, command="")
                for each in copies
            ]
        return found, losses


def interval(changes: Sequence[float]) -> Spread | None:
    """Return Student's 95 % interval of the mean's exponential; None for one document."""
    if len(changes) < 2:
        return None
    half = student_quantile(len(changes) - 1) * statistics.stdev(changes) / len(changes) ** 0.5
    mean = statistics.fmean(changes)
    return Spread("ci95", math.exp(mean - half), math.exp(mean + half))


def run(options: argparse.Namespace, bar: Progress) -> list[Measurement]:
    """Return the figures of all contenders, and the mean span of each share."""
    model = deepseek.load(options.model, dtype=options.dtype, context=options.context)
    if not isinstance(model, Decoder) or model.tokenizer is None or model.planner is not None:
        must = "a decoder with a tokenizer that sees all"
        raise ConfigError(describe("model", "the benchmark of spans", must, options.model))
    whole = default_corpus() if options.text is None else read_corpus(options.text)
    half = len(whole.text) // 2
    corpus = Corpus(name=f"{whole.name}, second half", text=whole.text[half:])
    pieces = documents(model.tokenizer.encode(corpus.text), options.length, options.documents)
    about = {"model": options.model, "dtype": options.dtype, "length": options.length}
    about |= {"context": model.config.max_positions, **corpus.conditions()}
    trial = Trial(model, corpus, pieces, options.probes, about, bar)
    found, dense = trial.measured("dense", None, None)
    segments = Segments()
    boundaries = Boundaries.of(model.tokenizer)
    planners: dict[str, Planner] = {
        "segments": SegmentPlanner(boundaries, segments),
        "segments-unlinked": SegmentPlanner(boundaries, segments.replace(links=0)),
    }
    for share in options.shares:
        bar.console.print(f"spans of {share}")
        model.planner = None
        result = attention_spans(
            model,
            text=Corpus(name=f"{whole.name}, first half", text=whole.text[:half]),
            length=options.length,
            num_texts=options.read,
            share=share,
        )
        found += result.measurements
        planners[f"spans-{share}"] = SpanPlanner(result.spans)
    for name, planner in planners.items():
        figures, _ = trial.measured(name, planner, dense)
        found += figures
        if name == "segments-unlinked":
            continue
        seen = next(each.value for each in figures if each.name == "tokens_seen")
        window = window_of(model.config, seen, options.length)
        found += trial.measured(f"window-as-{name}", window, dense)[0]
    return found


def show(found: Sequence[Measurement]) -> None:
    """Print a line for each contender, and the mean spans."""
    rows: dict[str, list[Measurement]] = {}
    for item in found:
        if "contender" in item.conditions:
            rows.setdefault(item.conditions["contender"], []).append(item)
        else:
            print(f"{item.name} of {item.conditions['share']}: {item.value:.1f} {item.unit}")
    table = Table("", "seen", "listed", "perplexity", "ratio", "copied, near to far")
    for name, items in rows.items():
        value = {item.name: item for item in items}
        ratio = value["perplexity_ratio"]
        spread = ratio.spread
        bounds = "" if spread is None else f" ({spread.low:.3f} to {spread.high:.3f})"
        copied = [item.value for item in items if item.name == "copy_accuracy"]
        table.add_row(
            name,
            f"{value['tokens_seen'].value:.0f}",
            f"{value['tokens_listed'].value:.0f}",
            f"{value['perplexity'].value:.3f}",
            f"{ratio.value:.4f}{bounds}",
            "  ".join(f"{each:.3f}" for each in copied),
        )
    Console(width=120).print(table)


def share_of(word: str) -> float:
    """Return a share out of a word.

    Raises:
        argparse.ArgumentTypeError: it is none between 0 and 1.
    """
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1; got {word!r}")
    return value


def main() -> int:
    """Measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, help="(the language reference inside Python)")
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a document")
    parser.add_argument("--context", type=positive, help="stretch the model's positions to it")
    parser.add_argument("--documents", type=positive, default=4)
    parser.add_argument("--probes", type=positive, default=4, help="copies at each distance")
    parser.add_argument("--shares", type=share_of, nargs="+", default=[0.9, 0.98])
    parser.add_argument(
        "--read", type=positive, default=2, help="pieces that spans are measured on"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.length < 4 * PASSAGE:
        must = f"at least {4 * PASSAGE}"
        raise ConfigError(describe("--length", "the benchmark of spans", must, options.length))
    command = shlex.join(["python", "benchmarks/spans.py", *sys.argv[1:]])
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        found = [dataclasses.replace(each, command=command) for each in run(options, bar)]
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"spans: {error}")
    except KeyboardInterrupt:
        sys.exit("spans: stopped")
