"""Attention through PyTorch's scaled_dot_product_attention: the portable fast path."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deepseek.errors import ConfigError, describe
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.means import append_means
from deepseek.ops.attention.reference import distance_bias, visible
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.hardware import computes_bf16


def attention_sdpa(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None,
    slopes: Tensor | None,
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, None]:
    """Return the same as `attention_reference`, in the dtype of the queries.

    A table is executed as a mask: correct, but not sparse. One query per row is computed with the
    query heads of a KV group as rows of one product, which spares SDPA the repetition of the keys.

    Raises:
        ConfigError: the log-sum-exp is asked for, which PyTorch's function does not return.
    """
    if return_lse:
        must = "False for the sdpa execution, which keeps no log-sum-exp"
        step = "Use impl='auto' or 'reference'"
        raise ConfigError(describe("return_lse", "attention", must, return_lse, step))
    keys, values = kv.dense(layout.num_slots)
    dtype = queries.dtype
    if table is not None and table.means:
        seen = visible(layout, table, queries.shape[1], keys.shape[1], queries.device)
        seen, blind = _never_blind(seen)
        keys, values, mask = append_means(keys, values, seen, layout, table, slopes)
        mask = mask.to(_mask_dtype(queries))
    else:
        mask, blind = _mask(layout, table, slopes, queries, keys.shape[1])
    if layout.num_queries == 1:
        out = _one_query(queries, keys, values, mask, scale)
    else:
        if dtype == torch.bfloat16 and not computes_bf16(queries.device):
            queries, keys, values = queries.float(), keys.float(), values.float()
            mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        out = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and layout.causal,
            scale=scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.to(dtype), None


def _one_query(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    rows, heads, _, _ = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(rows, kv_heads, heads // kv_heads, -1)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, -1)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, 1, -1)


def _mask(
    layout: Layout, table: BlockTable | None, slopes: Tensor | None, queries: Tensor, kv_heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask SDPA needs (None when plain attention says the same) and which queries see
    nothing, if any."""
    is_whole = layout.query_start[0] == 0 and layout.num_queries == layout.num_slots
    plain = layout.is_uniform and (not layout.causal or layout.num_queries == 1 or is_whole)
    if table is None and slopes is None and plain:
        return None, None
    memo = layout.memo if table is None else table.memo
    key = ("sdpa", queries.dtype, slopes is not None)
    if key not in memo or memo[key][2]() is not layout:
        seen, blind = _never_blind(
            visible(layout, table, queries.shape[1], kv_heads, queries.device)
        )
        if slopes is not None:
            bias = distance_bias(layout, slopes, torch.float32)
            seen = bias.masked_fill(~seen, float("-inf")).to(_mask_dtype(queries))
        # held weakly: the memo may be the layout's own
        memo[key] = (seen, blind, weakref.ref(layout))
    return memo[key][:2]


def _mask_dtype(queries: Tensor) -> torch.dtype:
    """Return the dtype of numbers that are added to scores: float32 where bfloat16 scores take it,
    for a long distance has no room in bfloat16."""
    is_narrow = queries.dtype == torch.bfloat16 and queries.device.type == "cpu"
    return torch.float32 if is_narrow else queries.dtype


def _never_blind(seen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what queries see, slot 0 where they see nothing, and which of them these are, if any.

    A softmax needs something to see; the caller zeroes the output of a blind query.
    """
    blind = ~seen.any(-1, keepdim=True)
    if not bool(blind.any()):
        return seen, None
    seen = seen.clone()
    seen[..., :1] |= blind
    return seen, blind
