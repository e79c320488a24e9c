"""What all layers of one forward pass share."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from deepseek.models.planner import Planner
from deepseek.ops.attention import (
    AttentionImpl,
    BlockTable,
    DenseKV,
    KVCache,
    Layout,
    PagedKV,
    attention,
)


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
    threshold: float = 0.0
    """A head whose gate is below it is not computed."""

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

    def attend(
        self,
        layer: int,
        queries: Tensor,
        kv: DenseKV | PagedKV,
        gates: Tensor | None,
        scale: float | None = None,
    ) -> Tensor:
        """Return a layer's attention [B, heads, T, value dim], times its gates.

        Args:
            layer: for the planner.
            queries: [B, heads, T, key dim].
            kv: of `store`.
            gates: [B, T, heads], zero for a head that is not computed; None for none.
            scale: of the scores, as in `attention`.
        """
        by_head = None if gates is None else gates.transpose(1, 2)
        out = attention(
            queries,
            kv,
            self.layout,
            table=self.plan(layer, queries, kv),
            slopes=self.slopes,
            scale=scale,
            wanted=by_head != 0 if by_head is not None and self.threshold else None,
            impl=self.impl,
        )
        return out if by_head is None else out * by_head[..., None].to(out.dtype)
