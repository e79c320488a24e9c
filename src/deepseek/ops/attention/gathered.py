"""Attention that computes what a block table lists and nothing else, with gradients: what sparse
training uses on a CPU, in plain PyTorch.

The listed blocks of keys and values are gathered for each block of queries and meet them in one
batched product. The backward pass gathers and multiplies anew, so that memory grows with the text
and not with what is seen of it (as FlashAttention does, Dao et al. 2022, 2205.14135, section 3.1;
here probabilities are made whole, a chunk of query blocks at a time).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.hardware import computed_in, computes_bf16, wide_of

CHUNK_SCORES = 1 << 22
"""Scores that are in memory at a time; a chunk holds one query block at least."""
LEAST_QUERIES = 16
"""Fewest queries that "auto" gathers for: keys are copied once for each block of them, those of a
cache even once more."""
MOST_LISTED = 0.5
"""Largest share of the key blocks that "auto" gathers; from there on a mask costs less."""


def attention_gathered(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None,
    slopes: Tensor | None,
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the same as `attention_reference`, scores and probabilities in the dtype of the
    inputs, or that of autocast; the log-sum-exp of these scores has gradients too.

    Raises:
        ConfigError: there is no table, or one with means, or a distance bias.
    """
    if table is None or not suits(table, slopes):
        must = "a block table without means, and no distance bias, for the gathered execution"
        step = "Use attention='auto' or 'sdpa'"
        raise ConfigError(describe("table", "attention", must, "another one", step))
    keys, values = kv.dense(layout.num_slots)
    dtype = computed_in(queries)
    if dtype == torch.bfloat16 and not computes_bf16(queries.device):
        dtype = torch.float32
    rows, heads, length, _ = queries.shape
    places = _Places(table, layout, rows, heads, keys.shape[1])
    out, lse = _Gathered.apply(  # type: ignore[misc]
        places.in_query_blocks(queries.to(dtype) * scale),
        places.in_key_blocks(keys.to(dtype)),
        places.in_key_blocks(values.to(dtype)),
        places,
        return_lse,
    )
    if lse is not None:
        lse = places.in_rows(lse, length)[..., 0]
    return places.in_rows(out, length).to(queries.dtype), lse


def suits(table: BlockTable, slopes: Tensor | None) -> bool:
    """Return whether it runs this table: one without means, and without a distance bias."""
    return slopes is None and not table.means


def pays(table: BlockTable, layout: Layout) -> bool:
    """Return whether it is faster than a mask: few blocks, and many queries that share them."""
    listed = table.indices.shape[-1]
    is_sparse = listed <= MOST_LISTED * table.num_key_blocks(layout, table.block_size)
    return is_sparse and min(table.query_size, layout.num_queries) >= LEAST_QUERIES


class _Places:
    """Which rows of the gathered tensors belong together.

    Shapes: N query blocks, G = rows x KV heads, R = query heads of a KV head, Q = queries of a
    block, P slots of a key block, W = listed blocks.
    """

    def __init__(
        self, table: BlockTable, layout: Layout, rows: int, heads: int, kv_heads: int
    ) -> None:
        self.table, self.layout = table, layout
        self.rows, self.kv_heads, self.repeats = rows, kv_heads, heads // kv_heads
        self.num_blocks = table.num_query_blocks(layout, table.query_size)
        # A single block, as in decoding, needs no filling up with queries that do not exist.
        is_single = self.num_blocks == 1
        self.size = layout.num_queries if is_single else table.query_size
        self.offsets = [0 if is_single else at % self.size for at in layout.query_start]
        device = table.indices.device
        first = torch.tensor(layout.query_start, device=device) - torch.tensor(
            self.offsets, device=device
        )
        filled = torch.arange(self.num_blocks * self.size, device=device)
        self.query_slots = (first[:, None] + filled).view(rows, self.num_blocks, self.size)
        self.key_blocks = table.num_key_blocks(layout, table.block_size)
        counts = table.counts.expand(-1, -1, self.num_blocks)
        self.widths: list[int] = counts.amax((0, 1)).clamp(min=1).tolist()
        group = torch.arange(rows * kv_heads, device=device).view(rows, kv_heads, 1, 1)
        self.held = table.held()
        listed = torch.where(self.held, table.indices, 0).long()
        self.gathered = (listed + group * self.key_blocks).permute(2, 0, 1, 3).flatten(1, 2)

    def in_query_blocks(self, queries: Tensor) -> Tensor:
        """Return queries [B, heads, T, dim] as [N, G, R x Q, dim], filled up with zeros."""
        total = self.num_blocks * self.size
        filled = torch.stack(
            [
                F.pad(row, (0, 0, offset, total - offset - row.shape[1]))
                for row, offset in zip(queries, self.offsets, strict=True)
            ]
        )
        blocks = filled.view(-1, self.repeats, self.num_blocks, self.size, filled.shape[-1])
        return blocks.permute(2, 0, 1, 3, 4).flatten(2, 3).contiguous()

    def in_rows(self, blocks: Tensor, length: int) -> Tensor:
        """Return [N, G, R x Q, dim] as [B, heads, T, dim]."""
        parts = blocks.view(self.num_blocks, self.rows, -1, self.size, blocks.shape[-1])
        filled = parts.permute(1, 2, 0, 3, 4).flatten(2, 3)
        rows = zip(filled, self.offsets, strict=True)
        return torch.stack([row[:, offset : offset + length] for row, offset in rows])

    def in_key_blocks(self, states: Tensor) -> Tensor:
        """Return keys or values [B, KV heads, S, dim] as [G x key blocks, P, dim]."""
        missing = self.key_blocks * self.table.block_size - states.shape[2]
        filled = F.pad(states, (0, 0, 0, missing)) if missing else states
        return filled.reshape(-1, self.table.block_size, states.shape[-1])

    def chunks(self, scores_of_a_slot: int) -> Iterator[slice]:
        """Yield query blocks that are computed together."""
        start = 0
        while start < self.num_blocks:
            stop, width = start + 1, self.widths[start]
            while stop < self.num_blocks:
                width = max(width, self.widths[stop])
                slots = (stop + 1 - start) * width * self.table.block_size
                if slots * scores_of_a_slot > CHUNK_SCORES:
                    break
                stop += 1
            yield slice(start, stop)
            start = stop

    def listed(self, chunk: slice) -> Tensor:
        """Return which key blocks a chunk gathers, int64 [n, G, W]."""
        return self.gathered[chunk, :, : max(self.widths[chunk])]

    def hidden(self, chunk: slice) -> Tensor:
        """Return what the queries of a chunk do not see of what is gathered, bool [n, B or 1, KV
        heads or 1, R or 1, Q, W x P]."""
        table, layout, size = self.table, self.layout, self.table.block_size
        width = max(self.widths[chunk])
        place = torch.arange(size, device=table.indices.device)
        slots = (table.indices[:, :, chunk, :width, None] * size + place).flatten(-2)
        held = self.held[:, :, chunk, :width]
        queries = self.query_slots[: 1 if layout.is_uniform else None, None, chunk, :, None]
        seen = held.repeat_interleave(size, -1)[..., None, :]
        if layout.causal:
            seen = seen & (slots[..., None, :] <= queries)
        ends_behind = layout.query_start[0] + layout.num_queries > layout.key_length[0]
        if not layout.is_uniform or not layout.causal or ends_behind:
            end = torch.tensor(layout.key_length, device=slots.device).view(-1, 1, 1, 1, 1)
            seen = seen & (slots[..., None, :] < end)
        if layout.key_mask is not None:
            seen = seen & self._tokens(slots, layout.key_mask)[..., None, :]
        seen = seen[:, :, None]
        if table.reach is not None:
            reach = table.reach.expand(-1, -1, self.num_blocks)[:, :, chunk, None, None]
            by_head = slots[:, :, None, :, None]
            near = by_head > queries[:, :, None] - self._by_head(reach)
            seen = seen & (near | (by_head < table.first))
        if table.skip is not None:
            skip = table.skip[:, :, chunk, :width].repeat_interleave(size, -1)[..., None, :]
            seen = seen & ~self._by_head(skip)
        return ~seen.permute(3, 0, 1, 2, 4, 5)

    def _by_head(self, of_heads: Tensor) -> Tensor:
        """Return [B or 1, heads or 1, …] as [B or 1, KV heads or 1, R or 1, …]."""
        if of_heads.shape[1] == 1:
            return of_heads[:, None]
        return of_heads.unflatten(1, (self.kv_heads, self.repeats))

    def _tokens(self, slots: Tensor, key_mask: Tensor) -> Tensor:
        """Return which slots [B or 1, KV heads or 1, n, W x P] hold a token: bool of that shape,
        for all rows."""
        slots = slots.expand(self.rows, -1, -1, -1)
        inside = slots.long().clamp(0, key_mask.shape[1] - 1)
        return key_mask.gather(1, inside.flatten(1)).view(slots.shape)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One chunk of the forward pass, which the backward pass makes again."""

    listed: Tensor
    keys: Tensor
    values: Tensor
    chances: Tensor
    blind: Tensor
    """bool: queries that see nothing."""
    lse: Tensor | None
    """[n x G, R x Q, 1]."""

    @classmethod
    def of(
        cls,
        chunk: slice,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        places: _Places,
        return_lse: bool = False,
    ) -> _Chunk:
        listed = places.listed(chunk)
        flat, shape = listed.flatten(), (listed.shape[0] * listed.shape[1], -1)
        keys = keys[flat].view(*shape, keys.shape[-1])
        values = values[flat].view(*shape, values.shape[-1])
        scores = queries[chunk].flatten(0, 1) @ keys.transpose(1, 2)
        hidden = places.hidden(chunk)
        by_head = (listed.shape[0], places.rows, places.kv_heads, places.repeats, places.size)
        # Several times faster than to fill by a mask; finite, so that a blind query has no NaN.
        lowest = torch.finfo(scores.dtype).min / 2
        scores.view(*by_head, -1).add_(hidden.to(scores.dtype).mul_(lowest))
        blind = hidden.amin(-1, keepdim=True)
        lse = scores.to(wide_of(scores)).logsumexp(-1, keepdim=True) if return_lse else None
        return cls(listed, keys, values, scores.softmax(-1), blind, lse)

    def shown(self, states: Tensor, places: _Places, blank: float = 0.0) -> Tensor:
        """Return states [n x G, R x Q, dim] with `blank` for the blind queries, in their place."""
        shape = (-1, places.rows, places.kv_heads, places.repeats, places.size, states.shape[-1])
        states.view(shape).masked_fill_(self.blind, blank)
        return states


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, places: _Places, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out = queries.new_empty(*queries.shape[:-1], values.shape[-1])
        wide = wide_of(queries)
        lse = queries.new_empty(*queries.shape[:-1], 1, dtype=wide) if return_lse else None
        for chunk in places.chunks(queries.shape[1] * queries.shape[2]):
            part = _Chunk.of(chunk, queries, keys, values, places, return_lse)
            seen = part.shown(part.chances @ part.values, places)
            out[chunk] = seen.view(out[chunk].shape)
            if lse is not None and part.lse is not None:
                lse[chunk] = part.shown(part.lse, places, -torch.inf).view(lse[chunk].shape)
        ctx.save_for_backward(queries, keys, values)
        ctx.places = places
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gradient, of_lse = gradients
        assert gradient is not None
        queries, keys, values = ctx.saved_tensors
        places: _Places = ctx.places
        # sums over the query blocks
        wide = wide_of(keys)
        to_queries = torch.empty_like(queries)
        to_keys = torch.zeros_like(keys, dtype=wide)
        to_values = torch.zeros_like(values, dtype=wide)
        for chunk in places.chunks(queries.shape[1] * queries.shape[2]):
            part = _Chunk.of(chunk, queries, keys, values, places)
            inner = part.shown(gradient[chunk].flatten(0, 1).clone(), places)
            flat = part.listed.flatten()
            _add_blocks(to_values, flat, part.chances.transpose(1, 2) @ inner)
            slope = inner @ part.values.transpose(1, 2)
            slope = torch.ops.aten._softmax_backward_data(slope, part.chances, -1, queries.dtype)
            if of_lse is not None:
                inner = part.shown(of_lse[chunk].flatten(0, 1).clone(), places)
                slope = slope + part.chances * inner.to(slope.dtype)
            to_queries[chunk] = (slope @ part.keys).view(to_queries[chunk].shape)
            _add_blocks(to_keys, flat, slope.transpose(1, 2) @ queries[chunk].flatten(0, 1))
        return to_queries, to_keys.to(keys.dtype), to_values.to(values.dtype), None, None


def _add_blocks(total: Tensor, blocks: Tensor, part: Tensor) -> None:
    """Add to the blocks of `total` [blocks, P, dim], some of them several times."""
    total.index_add_(0, blocks, part.reshape(-1, *total.shape[1:]).to(total.dtype))
