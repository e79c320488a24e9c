"""Static sparse attention: what a query sees depends on its place alone."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from deepseek.models.config import Pattern
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV


class StaticPlanner:
    """Lets every layer see the blocks of a pattern: for training with sparse attention, and to hold
    routed attention against.

    Queries of a block share what they see, and a text is seen the same way whole, in chunks and
    token by token.
    """

    def __init__(self, pattern: Pattern | None = None) -> None:
        self.pattern = pattern or Pattern()

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return what the queries [B, heads, T, dim] of a layer see; None where that is all."""
        pattern = self.pattern
        if layout.num_slots <= (pattern.first + pattern.recent) * pattern.block_size:
            return None
        # Without random blocks every layer sees the same.
        key = ("static", pattern, layer if 0 < pattern.sparsity < 1 else None)
        if key not in layout.memo:
            layout.memo[key] = pattern_table(layout, pattern, layer, queries.device)
        return layout.memo[key]


def pattern_table(layout: Layout, pattern: Pattern, layer: int, device: torch.device) -> BlockTable:
    """Return the table of a pattern in a layer, one for all heads."""
    size = pattern.block_size
    query_blocks = BlockTable.num_query_blocks(layout, size)
    last = BlockTable.num_key_blocks(layout, size) - 1
    # A row shorter than the longest touches fewer blocks; its surplus query blocks hold no query.
    listed = [
        [seen_blocks(pattern, layer, min(start // size + at, last)) for at in range(query_blocks)]
        for start in layout.query_start
    ]
    return BlockTable.of_lists(listed, size, device)


@functools.lru_cache(maxsize=1 << 16)
def seen_blocks(pattern: Pattern, layer: int, own: int) -> tuple[int, ...]:
    """Return which blocks the queries of block `own` see, in order."""
    always = {*range(min(pattern.first, own + 1)), *range(max(own + 1 - pattern.recent, 0), own)}
    always |= {own, *(range(own, -1, -pattern.every) if pattern.every else ())}
    rest = [block for block in range(own) if block not in always]
    wanted = round(len(rest) * (1 - pattern.sparsity))
    chosen = np.random.default_rng((pattern.seed, layer, own)).permutation(len(rest))[:wanted]
    return tuple(sorted(always | {rest[at] for at in chosen}))
