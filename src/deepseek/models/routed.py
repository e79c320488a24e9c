"""Routed attention: every query sees the blocks that matter to it, chosen from all before it."""

from __future__ import annotations

from torch import Tensor

from deepseek.models.config import DecoderConfig
from deepseek.models.planner import WindowPlanner
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV
from deepseek.ops.attention.choice import choose_blocks
from deepseek.ops.routing import BLOCK, Routing


class RoutedPlanner:
    """Lets each layer choose the blocks that its queries see, without any training: the union of
    the first, the recent and the best blocks goes through one softmax.

    Args:
        config: of the model.
        routing: how many are seen, and which of them always.
        windows: of layers that slide and are not routed.
    """

    def __init__(
        self,
        config: DecoderConfig,
        routing: Routing | None = None,
        windows: WindowPlanner | None = None,
    ) -> None:
        self.routing = routing or Routing()
        self.windows = windows
        self.channels = slow_channels(config)

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return what the queries [B, heads, T, dim] of a layer see; None where that is all."""
        if self.windows is not None and layer in self.windows.layers:
            return self.windows.plan(layer, queries, kv, layout)
        if layout.num_slots <= self.routing.blocks_seen(0) * BLOCK:
            return None
        return choose_blocks(queries, kv, layout, self.routing, self.channels)


def slow_channels(config: DecoderConfig) -> list[int] | None:
    """Return the half of a head's channels that turn slowly with the position; None for all, where
    the head has no such order or its dim is no multiple of 64.

    What a query looks for far away it looks for in these: the fast ones have turned too often for
    their angles to tell one distance from another.
    """
    if config.positions != "rope" or config.latent is not None or config.head_dim % 64:
        return None
    quarter = config.head_dim // 4
    return [*range(quarter, 2 * quarter), *range(3 * quarter, 4 * quarter)]
