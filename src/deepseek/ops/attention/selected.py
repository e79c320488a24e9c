"""Attention of some queries alone: those of heads that are closed are not computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.reference import visible
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.hardware import computes_bf16

BLOCK = 128
"""Places of a row whose wanted queries are multiplied together."""


def attention_selected(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    wanted: Tensor,
    table: BlockTable | None,
    slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the same as `attention_reference` for the wanted queries, zeros for the others.

    The wanted queries of a KV head in a block of places meet the keys up to the block's end in one
    product; where none is wanted, keys and values are not read.

    Args:
        queries: [B, heads, T, dim].
        kv: keys and values.
        layout: where both sit.
        wanted: bool [B, heads, T].
        table: without means.
        slopes: of ALiBi.
        scale: of the scores.
    """
    keys, values = kv.dense(layout.num_slots)
    dtype, group = queries.dtype, queries.shape[1] // keys.shape[1]
    if dtype == torch.bfloat16 and not computes_bf16(queries.device):
        queries, keys, values = queries.float(), keys.float(), values.float()
    sight = _Sight(layout, table, slopes, queries.shape[1], keys.shape[1], queries.device)
    found, at = [], []
    for row, kv_head, heads, places in _blocks(wanted, group):
        stop = sight.stop(row, places)
        mask, blind = sight.mask(row, heads, places, stop)
        part = scaled_dot_product_attention(
            queries[row, heads, places][None],
            keys[row : row + 1, kv_head, :stop],
            values[row : row + 1, kv_head, :stop],
            attn_mask=mask.to(queries.dtype)[None],
            scale=scale,
        )
        found.append(part[0].masked_fill(blind, 0.0))
        at.append(torch.stack((torch.full_like(heads, row), heads, places)))
    out = queries.new_zeros(*queries.shape[:-1], values.shape[-1])
    if found:
        out = out.index_put(tuple(torch.cat(at, 1)), torch.cat(found).to(out.dtype))
    return out.to(dtype)


def suits(table: BlockTable | None) -> bool:
    """Return whether it runs this table: any without means."""
    return table is None or not table.means


def _blocks(wanted: Tensor, group: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield row and KV head, and heads and places [N] of the wanted queries of a block."""
    rows, num_heads, length = wanted.shape
    for row in range(rows):
        for first in range(0, num_heads, group):
            for start in range(0, length, BLOCK):
                block = wanted[row, first : first + group, start : start + BLOCK]
                heads, places = block.nonzero(as_tuple=True)
                if len(heads):
                    yield row, first // group, heads + first, places + start


class _Sight:
    """What queries see, as what is added to their scores."""

    def __init__(
        self,
        layout: Layout,
        table: BlockTable | None,
        slopes: Tensor | None,
        heads: int,
        kv_heads: int,
        device: torch.device,
    ) -> None:
        self._layout, self._slopes = layout, slopes
        self._slots = torch.arange(layout.num_slots, device=device)
        self._seen = None if table is None else visible(layout, table, heads, kv_heads, device)

    def stop(self, row: int, places: Tensor) -> int:
        """Return the slot behind the last that any of the queries may see, at least 1."""
        layout, last = self._layout, int(places.max())
        length = layout.key_length[row]
        return max(1, min(length, layout.query_start[row] + last + 1) if layout.causal else length)

    def mask(self, row: int, heads: Tensor, places: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Return float32 [N, stop], and which queries see nothing, bool [N, 1]; for these slot 0
        is shown, since a softmax needs something."""
        own = (places + self._layout.query_start[row])[:, None]
        seen = self._visible(row, heads, places, own, stop)
        blind = ~seen.any(-1, keepdim=True)
        seen = seen | (blind & (self._slots[:stop] == 0))
        bias = torch.zeros(seen.shape, device=seen.device)
        if self._slopes is not None:
            bias = -self._slopes.float()[heads, None] * (own - self._slots[:stop])
        return bias.masked_fill(~seen, float("-inf")), blind

    def _visible(self, row: int, heads: Tensor, places: Tensor, own: Tensor, stop: int) -> Tensor:
        layout, slots = self._layout, self._slots[:stop]
        if self._seen is not None:
            whole = self._seen.expand(layout.num_rows, -1, -1, -1)[row]
            return whole[heads if len(whole) > 1 else torch.zeros_like(heads), places, :stop]
        seen = (slots <= own) if layout.causal else torch.ones_like(slots == own)
        seen = seen & (slots < layout.key_length[row])
        return seen if layout.key_mask is None else seen & layout.key_mask[row, :stop]
