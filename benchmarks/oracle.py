"""How much of routed attention's loss is the choice's: beside blocks chosen by what attention
really looks at, and beside the most recent ones, as many of them.

    python -m benchmarks.oracle --text dracula.txt
    python -m benchmarks.oracle --text dracula.txt --lengths 2048 4096 --documents 10 --json

Everything runs through the modules, every token chooses for itself, and what is not seen counts by
its means (but for recent). Contenders:

- dense: everything is seen;
- routed: as the model routes, by the largest score with the slow half of the channels;
- oracle: the blocks with most of a query's attention, all channels, known before it attends; as
  many for each token and KV head as routed sees;
- recent: the first block and the most recent ones, as many.

Perplexity is that of the second halves of documents, as a ratio to dense attention's, KL in nats a
token; 95 % intervals over documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import deepseek
from benchmarks.spans import documents
from deepseek.cli.models import positive
from deepseek.errors import DeepseekError
from deepseek.evaluate import default_corpus, read_corpus
from deepseek.evaluate.intervals import student_quantile
from deepseek.models import Decoder, DecoderConfig
from deepseek.models.planner import Planner
from deepseek.models.routed import RoutedPlanner
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV
from deepseek.ops.memory import keep_freed_memory
from deepseek.ops.routing import BLOCK
from deepseek.records import Measurement, Spread

QUERIES_AT_ONCE = 256
CONTENDERS = ("dense", "routed", "oracle", "recent")


class Counted(RoutedPlanner):
    """As many blocks as routed attention sees, chosen otherwise."""

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return the table of other blocks."""
        table = super().plan(layer, queries, kv, layout)
        if table is None:
            return None
        count = table.counts[0]
        own = torch.arange(layout.num_queries)[:, None] // BLOCK
        block = torch.arange(BlockTable.num_key_blocks(layout, BLOCK))
        always = (block < self.routing.first) | (block > own - self.routing.recent)
        worth = self.worth(queries, kv, layout).masked_fill(always, torch.inf)
        order = worth.masked_fill(block > own, -torch.inf).sort(-1, descending=True).indices
        width = int(count.max())
        return dataclasses.replace(table, indices=order[None, ..., :width].int(), memo={})

    def worth(self, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout) -> Tensor:
        """Return by what blocks are chosen: [KV heads, T, blocks]."""
        raise NotImplementedError


class OraclePlanner(Counted):
    """By attention: the largest share that a block has of a query head's."""

    def worth(self, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout) -> Tensor:
        """Return the share of each block."""
        keys = kv.dense(layout.num_slots)[0][0].float()
        asked = queries[0].float().unflatten(0, (keys.shape[0], -1)) * keys.shape[-1] ** -0.5
        spare = -layout.num_slots % BLOCK
        slots = torch.arange(layout.num_slots)
        found = []
        for start in range(0, layout.num_queries, QUERIES_AT_ONCE):
            some = asked[:, :, start : start + QUERIES_AT_ONCE]
            scores = some @ keys[:, None].transpose(-1, -2)
            later = slots > torch.arange(start, start + some.shape[2])[:, None]
            share = scores.masked_fill_(later, -torch.inf).softmax(-1)
            filled = torch.nn.functional.pad(share, (0, spare)).unflatten(-1, (-1, BLOCK))
            found.append(filled.sum(-1).amax(1))
        return torch.cat(found, 1)


class RecentPlanner(Counted):
    """The most recent ones."""

    def worth(self, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout) -> Tensor:
        """Return the place of each block."""
        kv_heads = kv.dense(layout.num_slots)[0].shape[1]
        place = torch.arange(BlockTable.num_key_blocks(layout, BLOCK)).float()
        return place.expand(kv_heads, layout.num_queries, -1)

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return the table, without means."""
        table = super().plan(layer, queries, kv, layout)
        return None if table is None else dataclasses.replace(table, means=False)


def planner_of(name: str, config: DecoderConfig) -> Planner | None:
    """Return the planner of a contender."""
    kinds = {"routed": RoutedPlanner, "oracle": OraclePlanner, "recent": RecentPlanner}
    return kinds[name](config) if name in kinds else None


@torch.no_grad()
def second_half(model: Decoder, name: str, piece: list[int]) -> tuple[float, Tensor]:
    """Return the mean loss of a document's second half, and the logarithms of its chances."""
    model.planner = planner_of(name, model.config)
    half = len(piece) // 2
    ids = torch.tensor([piece])
    states = model.final_states(ids)[0, half:-1]
    chances = model.lm_head(states).float().log_softmax(-1)
    wanted = ids[0, half + 1 :, None]
    return -float(chances.gather(-1, wanted).double().mean()), chances


def spread(values: list[float]) -> tuple[float, Spread | None]:
    """Return the mean and its interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, Spread(kind="ci95", low=mean - half, high=mean + half)


def measured(args: argparse.Namespace) -> list[Measurement]:
    """Return the ratio of perplexities, and KL, of each length and contender."""
    model = deepseek.load(args.model, dtype="bfloat16")
    corpus = default_corpus() if args.text is None else read_corpus(args.text)
    tokens = model.tokenizer.encode(corpus.text)
    command = shlex.join(["python", "-m", "benchmarks.oracle", *sys.argv[1:]])
    found = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(args.lengths) * args.documents * len(CONTENDERS))
        for length in args.lengths:
            losses: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            divergences: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            for number, piece in enumerate(documents(tokens, length, args.documents)):
                right: Tensor | None = None
                for name in CONTENDERS:
                    what = f"{length} tokens, document {number + 1}, {name}"
                    progress.update(task, description=what, advance=1)
                    loss, chances = second_half(model, name, piece)
                    right = chances if right is None else right
                    losses[name].append(loss)
                    gap = (right.exp() * (right - chances)).sum(-1).mean()
                    divergences[name].append(float(gap))
            for name in CONTENDERS[1:]:
                pairs = zip(losses[name], losses["dense"], strict=True)
                about = {"length": length, "contender": name, "documents": args.documents}
                about |= corpus.conditions()
                for figure, (value, around), unit in (
                    ("perplexity_log_ratio", spread([a - b for a, b in pairs]), "nats"),
                    ("kl", spread(divergences[name]), "nats"),
                ):
                    found.append(
                        Measurement(
                            name=figure,
                            value=value,
                            unit=unit,
                            spread=around,
                            conditions=about,
                            command=command,
                        )
                    )
    return found


def show(found: list[Measurement]) -> None:
    """Print a line for each length and contender."""
    table = Table("tokens", "contender", "perplexity, ratio", "KL, nats")
    for ratio, gap in zip(found[::2], found[1::2], strict=True):
        cells = [str(ratio.conditions["length"]), str(ratio.conditions["contender"])]
        for each, form in ((ratio, math.exp), (gap, float)):
            text = f"{form(each.value):.4f}"
            if each.spread is not None:
                text += f" ({form(each.spread.low):.4f} to {form(each.spread.high):.4f})"
            cells.append(text)
        table.add_row(*cells)
    Console().print(table)


def main() -> int:
    """Measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="(the language reference inside Python)")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[2048, 4096])
    parser.add_argument("--documents", type=positive, default=6)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    found = measured(args)
    if args.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"oracle: {error}")
    except KeyboardInterrupt:
        sys.exit("oracle: stopped; nothing was kept")
