"""What all layers of one forward pass share."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from deepseek.models.planner import Planner
from deepseek.ops.attention import AttentionImpl, BlockTable, DenseKV, KVCache, Layout, PagedKV


@dataclasses.dataclass(frozen=True, eq=False)
class PassContext:
    """Placement, positions, cache and planner of one forward pass, made once and handed to every
    layer."""

    layout: Layout
    cos: Tensor | None
    """[B or 1, 1, T, rotated dim]; None without rotary positions."""
    sin: Tensor | None
    slopes: Tensor | None
    """[heads]; None without ALiBi."""
    cache: KVCache | None
    planner: Planner | None
    impl: AttentionImpl

    def store(self, layer: int, keys: Tensor, values: Tensor | None) -> DenseKV | PagedKV:
        """Write a layer's new keys and values [B, KV heads, T, dim] into the cache, if there is
        one; return what to attend to. `values` is None when they lie in the keys."""
        if self.cache is None:
            return DenseKV(keys, keys if values is None else values)
        pages = self.cache.layers[layer]
        pages.write(keys, values, self.layout)
        return pages

    def plan(self, layer: int, queries: Tensor, kv: DenseKV | PagedKV) -> BlockTable | None:
        """Return the layer's block table; None for dense."""
        if self.planner is None:
            return None
        return self.planner.plan(layer, queries, kv, self.layout)
