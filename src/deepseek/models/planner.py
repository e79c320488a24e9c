"""Planners: what decides which key blocks a layer's queries see."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV


@runtime_checkable
class Planner(Protocol):
    """The seam for sparse attention: called by a layer before its attention, once per forward pass.

    A planner may read the layer's queries and its keys (this pass's included, in slots). It returns
    a table that fits `layout` (see `BlockTable.check`), or None for dense. It changes neither. With
    every block listed the result must equal dense attention: the first test of every planner.
    `deepseek.testing.check_planner` holds one to all of it.
    """

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return what the queries [B, heads, T, dim] of a layer see."""
        ...


class WindowPlanner:
    """Sliding window: a query sees its own slot and the `window - 1` before it.

    Args:
        window: in tokens.
        layers: the layers that slide; the others are dense.
        block_size: slots per block of the table, the page size of the cache.
    """

    def __init__(self, window: int, layers: tuple[int, ...], block_size: int = 64) -> None:
        self.window = window
        self.layers = frozenset(layers)
        self.block_size = block_size

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return the window's table, the same for every sliding layer of a pass."""
        if layer not in self.layers or layout.num_slots <= self.window:
            return None
        key = ("window", self.window, self.block_size)
        if key not in layout.memo:
            layout.memo[key] = window_table(layout, self.window, self.block_size, queries.device)
        return layout.memo[key]


def window_table(layout: Layout, window: int, block_size: int, device: torch.device) -> BlockTable:
    """Return the table of a sliding window of `window` tokens."""
    query_blocks = BlockTable.num_query_blocks(layout, block_size)
    first = torch.tensor(layout.query_start, device=device) // block_size
    own = first[:, None] + torch.arange(query_blocks, device=device)
    # A row shorter than the longest touches fewer blocks; its surplus query blocks hold no query.
    own = own.clamp(max=BlockTable.num_key_blocks(layout, block_size) - 1)
    width = -(-(window - 1) // block_size) + 1
    listed = own[..., None] - torch.arange(width, device=device)
    return BlockTable(
        indices=listed.clamp(min=0).to(torch.int32)[:, None],
        counts=(own + 1).clamp(max=width).to(torch.int32)[:, None],
        block_size=block_size,
        reach=torch.full((1, 1, 1), window, dtype=torch.int32, device=device),
    )
