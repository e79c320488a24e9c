"""Rows whose queries begin anywhere in a query block, filled up to whole query blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fill_blocks(states: Tensor, offsets: Sequence[int], total: int) -> Tensor:
    """Return states [B, heads, T, dim] as [B, heads, total, dim]: row b begins at `offsets[b]`,
    what is in none of them is zero."""
    rows = [
        F.pad(row, (0, 0, offset, total - offset - row.shape[1]))
        for row, offset in zip(states, offsets, strict=True)
    ]
    return torch.stack(rows)


def cut_blocks(filled: Tensor, offsets: Sequence[int], length: int) -> Tensor:
    """Return [B, heads, total, dim] as [B, heads, T, dim]: the other way round."""
    rows = zip(filled, offsets, strict=True)
    return torch.stack([row[:, offset : offset + length] for row, offset in rows])
