"""Attention spans: how far back each head sees, by layer and head."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.models.planner import WindowPlanner
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans(Config):
    """The reach of each head of each layer, as data: `to_dict` gives what JSON holds, `from_dict`
    reads it back.

    Source: a span for each head as in Adaptive Attention Span (Sukhbaatar et al. 2019, 1905.07799);
    there it is learned by a soft mask, here it is given, or measured
    (`deepseek.evaluate.attention_spans`), and hard.
    """

    reach: tuple[tuple[int, ...], ...]
    """Tokens that a query head sees, by layer and head: the query's own and those before it."""
    first: int = 64
    """Tokens at the start of a text that every head sees besides."""

    def __post_init__(self) -> None:
        if not self.reach or len({len(heads) for heads in self.reach}) != 1 or not self.reach[0]:
            must = "a list for each layer, all of as many heads"
            got = [len(heads) for heads in self.reach]
            raise ConfigError(describe("reach", "Spans", must, got))
        if (least := min(min(heads) for heads in self.reach)) < 1:
            raise ConfigError(describe("reach", "Spans", "at least 1 token", least))
        if self.first < 0:
            raise ConfigError(describe("first", "Spans", "at least 0 tokens", self.first))

    @property
    def mean(self) -> float:
        """The mean reach of all heads, in tokens."""
        heads = [reach for layer in self.reach for reach in layer]
        return sum(heads) / len(heads)

    def mean_seen(self, length: int) -> float:
        """Return how many tokens a token of a text of `length` tokens sees, on average over heads
        and places, the first ones included."""
        places = torch.arange(length)
        heads = torch.tensor(self.reach).flatten()[:, None]
        seen = torch.minimum(places + 1, heads + self.first)
        return float(seen.double().mean())


class SpanPlanner:
    """Lets each head see as far as its span reaches, and the first tokens, through one softmax.

    Reaches are exact to the token. A KV head's blocks that none of its query heads reaches are not
    listed, so that they are neither read nor computed where a table is computed by gathering.

    Args:
        spans: as many layers and heads as the model has.
        windows: of layers that slide, which keep their windows.
        block_size: slots per block of the table, the page size of the cache.

    Raises:
        ConfigError: `spans` is something else.
    """

    def __init__(
        self, spans: Spans, windows: WindowPlanner | None = None, block_size: int = 64
    ) -> None:
        if not isinstance(spans, Spans):
            step = "Measure some by deepseek.evaluate.attention_spans"
            raise ConfigError(describe("spans", "SpanPlanner", "a Spans", spans, step))
        self.spans = spans
        self.windows = windows
        self.block_size = block_size

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return what the queries [B, heads, T, dim] of a layer see; None where that is all.

        Raises:
            ConfigError: the spans are those of a model of another shape.
        """
        if self.windows is not None and layer in self.windows.layers:
            return self.windows.plan(layer, queries, kv, layout)
        given = self.spans.reach
        if layer >= len(given) or queries.shape[1] != len(given[layer]):
            must = f"those of {queries.shape[1]} heads in layer {layer}"
            got = f"{len(given)} layers of {len(given[0])} heads"
            raise ConfigError(describe("spans", "SpanPlanner", must, got))
        if layout.num_slots <= self.spans.first + min(given[layer]):
            return None
        pages = kv.keys.shape[1] if isinstance(kv, DenseKV) else kv.key_pages.shape[2]
        reach = torch.tensor(given[layer], dtype=torch.int32, device=queries.device)
        return span_table(layout, reach, self.spans.first, pages, self.block_size)


def span_table(
    layout: Layout, reach: Tensor, first: int, num_kv_heads: int, block_size: int
) -> BlockTable:
    """Return the table of a layer's spans.

    Args:
        layout: where queries and keys sit.
        reach: int32 [heads], in tokens.
        first: slots at the start that every head sees.
        num_kv_heads: a divisor of the heads.
        block_size: slots per block.
    """
    query_blocks = BlockTable.num_query_blocks(layout, block_size)
    start = torch.tensor(layout.query_start, device=reach.device) // block_size
    own = start[:, None] + torch.arange(query_blocks, device=reach.device)
    # A row shorter than the longest touches fewer blocks; its surplus query blocks hold no query.
    own = own.clamp(max=BlockTable.num_key_blocks(layout, block_size) - 1)[:, None]
    widest = reach.view(num_kv_heads, -1).amax(1)[:, None]
    # The first query of a block looks back furthest.
    begin = (own * block_size - widest + 1).clamp(min=0) // block_size
    starting = begin.clamp(max=-(-first // block_size))
    counts = starting + own - begin + 1
    place = torch.arange(int(counts.max()), device=reach.device)
    indices = place + (begin - starting)[..., None] * (place >= starting[..., None])
    return BlockTable(
        indices=indices.to(torch.int32),
        counts=counts.to(torch.int32),
        block_size=block_size,
        reach=reach[None, :, None],
        first=first,
    )
