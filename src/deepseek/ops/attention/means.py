"""Blocks that a query does not see, as one key and one value each: their means."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.table import BlockTable


def append_means(
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    layout: Layout,
    table: BlockTable,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values with the means of all blocks behind them, and what is added to the
    scores: float32 [B or 1, heads or 1, T, S + blocks], minus infinity where a query does not see.

    A block of c tokens counts as c keys with the score of their mean key. That is less than their
    own scores come to (Jensen): what one of them alone would say is lost, what they have in common
    is kept.

    Args:
        keys: [B, KV heads, S, dim].
        values: [B, KV heads, S, dim].
        seen: bool [B or 1, heads or 1, T, S], the slots that queries see.
        layout: where queries and keys sit.
        table: which blocks are listed.
        slopes: [heads], ALiBi slopes; a mean lies in the middle of its block.
    """
    slots, size = keys.shape[2], table.block_size
    means = block_means(keys, values, layout, size)
    blocks, count = means.count.shape[-1], means.count[:, None]
    heads = seen.shape[1] if slopes is None else slopes.shape[0]
    unseen = table.unseen(layout, heads, keys.shape[1]) & (count > 0)[:, :, None]
    rows, heads = max(seen.shape[0], unseen.shape[0]), max(seen.shape[1], unseen.shape[1])
    shown = torch.cat([each.expand(rows, heads, -1, -1) for each in (seen, unseen)], -1)
    log_count = means.count.clamp(min=1).log()
    weight = torch.cat([log_count.new_zeros(len(log_count), slots), log_count], -1)
    bias = weight[:, None, None]
    if slopes is not None:
        middles = torch.arange(blocks, device=keys.device) * size + (size - 1) / 2
        places = torch.cat([torch.arange(slots, device=keys.device), middles])
        distance = layout.query_slots(keys.device)[:, None, :, None] - places
        bias = bias - slopes.float()[:, None, None] * distance
    bias = torch.where(shown, bias, -torch.inf)
    return torch.cat([keys, means.keys], 2), torch.cat([values, means.values], 2), bias


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMeans:
    """The mean key and the mean value of each block."""

    keys: Tensor
    """[B, KV heads, blocks, dim]."""
    values: Tensor
    """[B, KV heads, blocks, value dim]."""
    count: Tensor
    """float32 [B or 1, blocks], the tokens of a block."""


def block_means(keys: Tensor, values: Tensor, layout: Layout, size: int) -> BlockMeans:
    """Return the means of blocks of `size` slots, over those that hold a token.

    Args:
        keys: [B, KV heads, S, dim].
        values: [B, KV heads, S, value dim].
        layout: where they sit.
        size: slots of a block.
    """
    slots = keys.shape[2]
    blocks = -(-layout.num_slots // size)
    spare = blocks * size - slots
    length = torch.tensor(layout.key_length, device=keys.device)
    mask = (torch.arange(slots, device=keys.device) < length[:, None]).float()
    if layout.key_mask is not None:
        mask = mask * layout.key_mask[:, :slots]
    tokens = pad(mask, (0, spare)).view(-1, 1, blocks, size)
    count = tokens.sum(-1)
    share = (tokens / count.clamp(min=1)[..., None])[..., None]

    def mean(each: Tensor) -> Tensor:
        by_block = pad(each, (0, 0, 0, spare)).unflatten(2, (blocks, size))
        return (by_block * share).sum(3).to(each.dtype)

    return BlockMeans(mean(keys), mean(values), count[:, 0])
