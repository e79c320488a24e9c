"""Dense causal attention with gradients by products of blocks of queries: what training uses on a
CPU.

PyTorch's attention on a CPU is made of small products that reach a fraction of what the processor
can do. Here a block of queries meets all keys before its end in one batched product, and what lies
above the diagonal is skipped block by block. Probabilities are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.hardware import computed_in, computes_bf16, wide_of

BLOCK = 128
"""Queries that are multiplied together."""
MAX_QUERIES = 1024
"""Longest rows that "auto" runs so: the kept probabilities grow with the square."""


def attention_blocked(
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
        ConfigError: it is not dense causal attention of whole rows without padding and bias.
    """
    if not suits(kv, layout, table, slopes):
        must = "dense and causal, whole rows of one length, for the blocked execution"
        step = "Use attention='auto' or 'sdpa'"
        raise ConfigError(describe("layout", "attention", must, "another one", step))
    keys, values = kv.dense(layout.num_slots)
    dtype = computed_in(queries)
    out, lse = _Blocked.apply(  # type: ignore[misc]
        queries.to(dtype), keys.to(dtype), values.to(dtype), scale, return_lse
    )
    return out.to(queries.dtype), lse


def suits(
    kv: DenseKV | PagedKV, layout: Layout, table: BlockTable | None, slopes: Tensor | None
) -> bool:
    """Return whether it is dense causal attention of whole rows without padding and bias."""
    is_whole = layout.query_start[0] == 0 and layout.num_queries == layout.num_slots
    plain = layout.is_uniform and layout.causal and is_whole
    return plain and table is None and slopes is None and isinstance(kv, DenseKV)


def pays(queries: Tensor, kv: DenseKV) -> bool:
    """Return whether it is the fastest: bfloat16 with gradients on a CPU, rows not too long."""
    wants = torch.is_grad_enabled() and any(
        each.requires_grad for each in (queries, kv.keys, kv.values)
    )
    is_bf16 = queries.device.type == "cpu" and computed_in(queries) == torch.bfloat16
    return wants and is_bf16 and queries.shape[2] <= MAX_QUERIES and computes_bf16(queries.device)


class _Blocked(torch.autograd.Function):
    """Shapes inside: G = rows x KV heads, R = query heads of a KV head, N = queries of a block."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, heads, length, dim = queries.shape
        kv_heads, value_dim = keys.shape[1], values.shape[-1]
        groups, repeats = rows * kv_heads, heads // kv_heads
        queries = (queries * scale).reshape(groups, repeats, length, dim)
        keys, values = keys.reshape(groups, length, dim), values.reshape(groups, length, value_dim)
        out = queries.new_empty(groups, repeats, length, value_dim)
        hidden = queries.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        lse = queries.new_empty(out.shape[:-1], dtype=wide_of(queries)) if return_lse else None
        kept = []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            block = queries[:, :, start:stop].reshape(groups, -1, dim)
            scores = block @ keys[:, :stop].transpose(1, 2)
            count = stop - start
            scores.view(groups, repeats, count, stop)[..., start:] += hidden[:count, :count]
            chances = torch.softmax(scores, -1)
            if lse is not None:
                sums = scores.to(lse.dtype).logsumexp(-1)
                lse[:, :, start:stop] = sums.view(groups, repeats, count)
            part = chances @ values[:, :stop]
            out[:, :, start:stop] = part.view(groups, repeats, count, value_dim)
            kept.append(chances)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.scale, ctx.shape = scale, (rows, heads, kv_heads)
        lse = None if lse is None else lse.view(rows, heads, length)
        return out.view(rows, heads, length, value_dim), lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gradient, of_lse = gradients
        assert gradient is not None
        queries, keys, values, *kept = ctx.saved_tensors
        rows, heads, kv_heads = ctx.shape
        groups, repeats, length, dim = queries.shape
        value_dim, dtype = values.shape[-1], queries.dtype
        gradient = gradient.reshape(groups, repeats, length, value_dim)
        to_queries = torch.empty_like(queries)
        # sums over the blocks
        to_keys = torch.zeros_like(keys, dtype=torch.float32)
        to_values = torch.zeros_like(values, dtype=torch.float32)
        for chances, start in zip(kept, range(0, length, BLOCK), strict=True):
            stop = min(start + BLOCK, length)
            inner = gradient[:, :, start:stop].reshape(groups, -1, value_dim)
            block = queries[:, :, start:stop].reshape(groups, -1, dim)
            to_values[:, :stop] += chances.transpose(1, 2) @ inner
            slope = inner @ values[:, :stop].transpose(1, 2)
            slope = torch.ops.aten._softmax_backward_data(slope, chances, -1, dtype)
            if of_lse is not None:
                inner = of_lse.reshape(groups, repeats, length)[:, :, start:stop]
                slope = slope + chances * inner.reshape(groups, -1, 1).to(dtype)
            part = slope @ keys[:, :stop]
            to_queries[:, :, start:stop] = part.view(groups, repeats, stop - start, dim)
            to_keys[:, :stop] += slope.transpose(1, 2) @ block
        return (
            (to_queries * ctx.scale).view(rows, heads, length, dim),
            to_keys.to(dtype).view(rows, kv_heads, length, dim),
            to_values.to(dtype).view(rows, kv_heads, length, value_dim),
            None,
            None,
        )
