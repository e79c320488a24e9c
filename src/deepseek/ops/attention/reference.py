"""Attention in plain PyTorch: the specification that every other execution is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.means import append_means
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.hardware import wide_of


def attention_reference(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None,
    slopes: Tensor | None,
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(scale * q k^T + bias) v over what each query sees, computed in at least fp32,
    and the log-sum-exp where it is asked for.

    A query that sees nothing yields zeros, and minus infinity as its log-sum-exp. Arguments as in
    `deepseek.ops.attention.attention`.
    """
    keys, values = kv.dense(layout.num_slots)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    wide = wide_of(queries)
    seen = visible(layout, table, heads, kv_heads, queries.device)
    if table is not None and table.means:
        keys, values, bias = append_means(keys, values, seen, layout, table, slopes)
    else:
        bias = torch.zeros((), device=keys.device).masked_fill(~seen, float("-inf"))
        if slopes is not None:
            bias = bias + distance_bias(layout, slopes, wide)
    keys = keys.to(wide).repeat_interleave(heads // kv_heads, dim=1)
    values = values.to(wide).repeat_interleave(heads // kv_heads, dim=1)
    scores = queries.to(wide) @ keys.transpose(-1, -2) * scale + bias
    blind = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)
    out = (weights @ values).to(queries.dtype)
    if not return_lse:
        return out, None
    return out, scores.logsumexp(-1).masked_fill(blind[..., 0], float("-inf"))


def visible(
    layout: Layout,
    table: BlockTable | None,
    num_heads: int,
    num_kv_heads: int,
    device: torch.device,
) -> Tensor:
    """Return which slots each query sees: bool [B or 1, heads or 1, T, S]."""
    if table is None:
        return layout.visible(device)[:, None]
    return table.visible(layout, num_heads, num_kv_heads)


def distance_bias(layout: Layout, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the ALiBi bias [B, heads, T, S]: minus the head's slope times the distance in slots.

    Source: Press, Smith, Lewis 2022, "Train Short, Test Long", section 3; slots stand for
    positions, which the softmax cannot tell apart from a row that starts later.
    """
    slots = torch.arange(layout.num_slots, device=slopes.device)
    distance = layout.query_slots(slopes.device)[:, None, :, None] - slots
    return -(slopes.to(dtype)[None, :, None, None] * distance)
