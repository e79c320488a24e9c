"""Cross-modal masks: which kinds of slots (text, image, …) a query of each kind may see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV

Sees = Mapping[int, Sequence[int]]
"""The kinds that each kind sees."""
MOST_BLOCK = 64
"""Most slots of a block, the page size of the cache."""


class CrossModalPlanner:
    """Lets the tokens of each kind see the kinds that they may: text an image and text, say, and an
    image itself alone. Within what they may see the pass decides: a decoder's tokens see what is
    before them.

    Args:
        kinds: int64 [rows or 1, slots], of each slot; slots behind these are of the last kind.
        sees: the kinds that each kind sees.

    Raises:
        ConfigError: a kind that `sees` does not name.
    """

    def __init__(self, kinds: Tensor, sees: Sees) -> None:
        _check_kinds(kinds, sees)
        self.kinds, self.sees = kinds, sees

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable:
        """Return what the queries [B, heads, T, dim] of every layer see."""
        key = ("cross-modal", id(self))
        if key not in layout.memo:
            kinds = self.kinds.to(queries.device)
            missing = max(layout.num_slots, max(layout.query_start) + layout.num_queries)
            missing = max(missing - kinds.shape[1], 0)
            kinds = torch.cat((kinds, kinds[:, -1:].expand(-1, missing)), dim=1)
            slots = layout.query_slots(kinds.device)
            of_queries = kinds.expand(layout.num_rows, -1).gather(1, slots)
            of_keys = kinds[:, : layout.num_slots]
            layout.memo[key] = cross_modal_table(layout, of_queries, of_keys, self.sees)
        return layout.memo[key]


def cross_modal_table(
    layout: Layout, of_queries: Tensor, of_keys: Tensor, sees: Sees
) -> BlockTable:
    """Return the table by which queries see the keys of the kinds that they may see.

    Blocks are as large as the kinds allow, 64 slots at most: the border between two kinds is a
    border between blocks. Images of a multiple of 64 slots keep attention fast.

    Args:
        layout: where queries and keys sit. One that is not causal is for the keys of another
            modality, of which all are seen.
        of_queries: int64 [rows or 1, T], the kind of each query.
        of_keys: int64 [rows or 1, S], the kind of each slot.
        sees: the kinds that each kind sees.

    Raises:
        ConfigError: a kind that `sees` does not name.
        ShapeError: kinds that do not fit the layout.
    """
    for name, kinds, length in (
        ("of_queries", of_queries, layout.num_queries),
        ("of_keys", of_keys, layout.num_slots),
    ):
        if kinds.dim() != 2 or kinds.shape[0] not in (1, layout.num_rows):
            raise ShapeError(describe(name, "cross_modal_table", "[rows or 1, slots]", kinds.shape))
        if kinds.shape[1] != length:
            must = f"of {length} slots"
            raise ShapeError(describe(name, "cross_modal_table", must, list(kinds.shape)))
        _check_kinds(kinds, sees)
    of_queries = of_queries.expand(layout.num_rows, -1)
    of_keys = of_keys.expand(layout.num_rows, -1)
    size = _block_size(layout, of_queries, of_keys)
    start = torch.tensor(layout.query_start, device=of_keys.device)[:, None]
    blocks = torch.arange(BlockTable.num_query_blocks(layout, size), device=of_keys.device)
    own = start // size + blocks
    asking = (own * size - start).clamp(0, layout.num_queries - 1)
    kinds = torch.tensor(sorted(sees), device=of_keys.device)
    allowed = torch.tensor([[b in sees[a] for b in sorted(sees)] for a in sorted(sees)])
    asked = torch.searchsorted(kinds, of_queries.gather(1, asking))
    shown = torch.searchsorted(kinds, of_keys[:, ::size].contiguous())
    seen = allowed.to(of_keys.device)[asked[:, :, None], shown[:, None]]
    if layout.causal:
        seen &= torch.arange(seen.shape[-1], device=seen.device) <= own[..., None]
    counts = seen.sum(-1)
    order = (~seen).int().sort(dim=-1, stable=True).indices[..., : max(1, int(counts.max()))]
    return BlockTable(order.int()[:, None], counts.int()[:, None], size)


def _block_size(layout: Layout, of_queries: Tensor, of_keys: Tensor) -> int:
    """Return the largest size whose blocks hold one kind each."""
    size = MOST_BLOCK
    for start, asking, keys in zip(layout.query_start, of_queries, of_keys, strict=True):
        for kinds, offset in ((asking, start), (keys, 0)):
            borders = (kinds[1:] != kinds[:-1]).nonzero()[:, 0] + 1 + offset
            size = math.gcd(size, *borders.tolist())
    return size


def _check_kinds(kinds: Tensor, sees: Sees) -> None:
    unknown = set(kinds.unique().tolist()) - set(sees)
    if unknown:
        must = f"named in sees ({sorted(sees)})"
        raise ConfigError(describe("kinds", "cross-modal attention", must, sorted(unknown)))
