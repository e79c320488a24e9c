"""Draws what heads of routed attention see of a real text, beside where dense attention looks:

python scripts/routing_maps.py docs/assets/routing.svg --heads 13:1 20:1 4:1

A head is LAYER:KV_HEAD. The text is the default corpus of `deepseek.evaluate`, or a file.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

import deepseek
from deepseek.evaluate import default_corpus, read_corpus
from deepseek.models import Decoder, RoutedPlanner
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV
from deepseek.ops.routing import BLOCK

LEAST_MASS = 1e-4
INK, PALE = "#444444", "#888888"


@dataclasses.dataclass(frozen=True)
class Map:
    """What one KV head does, by token and key block: [tokens, key blocks]."""

    mass: np.ndarray
    """Share of a token's attention, dense softmax, mean over the query heads of the KV head."""
    seen: np.ndarray
    """1 where a token sees a block, routed."""

    @property
    def kept(self) -> float:
        """Share of the attention of the second half's tokens that falls on what they see."""
        half = len(self.mass) // 2
        return float((self.mass * self.seen)[half:].sum(1).mean())

    @property
    def tokens_seen(self) -> float:
        """Tokens of the blocks that the second half's tokens see, on average."""
        return float(self.seen[len(self.seen) // 2 :].sum(1).mean()) * BLOCK


def by_block(shares: np.ndarray) -> np.ndarray:
    """Return means over the tokens of each query block: [query blocks, key blocks]."""
    return shares.reshape(-1, BLOCK, shares.shape[1]).mean(1)


class Watcher:
    """A planner that keeps what heads would see if they were routed, and where they look, dense.

    Args:
        planner: that chooses.
        heads: layers and KV heads that are watched.
    """

    def __init__(self, planner: RoutedPlanner, heads: Sequence[tuple[int, int]]) -> None:
        self.planner, self.heads = planner, heads
        self.maps: dict[tuple[int, int], Map] = {}

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return None: layers stay dense, so that both maps are of the same queries."""
        watched = [head for at, head in self.heads if at == layer]
        if not watched:
            return None
        table = self.planner.plan(layer, queries, kv, layout)
        assert table is not None and table.query_size == 1, "a text longer than 1024 tokens"
        keys, _ = kv.dense(layout.num_slots)
        group = queries.shape[1] // keys.shape[1]
        for head in watched:
            mass = attention_mass(queries[0, head * group : (head + 1) * group], keys[0, head])
            self.maps[layer, head] = Map(mass, blocks_seen(table, head))
        return None


def attention_mass(queries: Tensor, keys: Tensor) -> np.ndarray:
    """Return where dense attention looks: [tokens, key blocks], see `Map`.

    Args:
        queries: [query heads, T, dim].
        keys: [T, dim].
    """
    slots = torch.arange(len(keys))
    found = []
    for some in slots.split(BLOCK):
        scores = queries[:, some].float() @ keys.float().T * keys.shape[-1] ** -0.5
        scores = scores.masked_fill(slots > some[:, None], -torch.inf)
        found.append(scores.softmax(-1).unflatten(-1, (-1, BLOCK)).sum(-1).mean(0))
    return torch.cat(found).numpy()


def blocks_seen(table: BlockTable, head: int) -> np.ndarray:
    """Return what tokens see: [tokens, key blocks], see `Map`."""
    indices, counts = table.indices[0, head].long(), table.counts[0, head]
    listed = (torch.arange(indices.shape[1]) < counts[:, None]).float()
    seen = torch.zeros(len(indices), len(indices) // BLOCK)
    return seen.scatter_add_(1, indices, listed).clamp(max=1).numpy()


def watch(length: int, text: Path | None, heads: Sequence[tuple[int, int]]) -> list[Map]:
    """Return the maps of some heads of SmolLM2 while it reads the start of a text."""
    model = deepseek.load("smollm2-135m", dtype="bfloat16", attention="dense")
    assert isinstance(model, Decoder) and model.tokenizer is not None
    corpus = default_corpus() if text is None else read_corpus(text)
    ids = model.tokenizer.encode(corpus.text)[:length]
    watcher = Watcher(RoutedPlanner(model.config), heads)
    model.planner = watcher
    with torch.inference_mode():
        model(torch.tensor([ids]), last_only=True)
    return [watcher.maps[head] for head in heads]


def draw(maps: Sequence[Map], heads: Sequence[tuple[int, int]]) -> Figure:
    """Return a figure: a column a head, dense attention above, what is seen below."""
    rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "text.color": INK})
    rcParams.update({"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    figure = Figure(figsize=(3.1 * len(maps) + 1, 6.6), layout="constrained")
    grid = figure.subplots(2, len(maps), squeeze=False, sharex=True, sharey=True)
    for column, (each, (layer, head)) in enumerate(zip(maps, heads, strict=True)):
        mass, seen = by_block(each.mass), by_block(each.seen)
        later = np.triu(np.ones(mass.shape, bool), 1)
        above = grid[0, column].imshow(
            np.ma.masked_where(later, mass.clip(LEAST_MASS)),
            norm=LogNorm(LEAST_MASS, 1),
            cmap="magma_r",
            interpolation="none",
        )
        below = grid[1, column].imshow(
            np.ma.masked_where(later, seen), vmin=0, vmax=1, cmap="Blues", interpolation="none"
        )
        grid[0, column].set_title(f"layer {layer}, KV head {head}", fontsize=11)
        told = f"second half: {each.tokens_seen:.0f} tokens\nseen, {each.kept:.0%} of attention"
        grid[1, column].text(
            0.97, 0.95, told, transform=grid[1, column].transAxes, ha="right", va="top", fontsize=9
        )
        grid[1, column].set_xlabel("key block")
    for row, (image, told) in enumerate(
        ((above, "dense: share of attention"), (below, "routed: share of tokens that see it"))
    ):
        grid[row, 0].set_ylabel(f"query block of {BLOCK} tokens")
        figure.colorbar(image, ax=list(grid[row]), label=told, shrink=0.85, aspect=25)
    for axis in grid.flat:
        _plain(axis)
    return figure


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def head_of(word: str) -> tuple[int, int]:
    """Return the layer and the KV head in LAYER:KV_HEAD."""
    layer, _, head = word.partition(":")
    return int(layer), int(head)


def main() -> None:
    """Watch and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--heads", type=head_of, nargs="+", required=True, metavar="LAYER:KV_HEAD")
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--length", type=int, default=4096, help="tokens, a multiple of 64 (4096)")
    args = parser.parse_args()
    maps = watch(args.length, args.text, args.heads)
    draw(maps, args.heads).savefig(args.picture, dpi=110, metadata={"Date": None})


if __name__ == "__main__":
    main()
