"""Attention by loops over rows, heads, queries and slots: slow enough to be plainly right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek.ops.attention import BlockTable, Layout


def entry(tensor: Tensor, *index: int) -> int:
    """Return an entry of a table whose dimensions of size 1 are shared."""
    place = tuple(0 if size == 1 else at for size, at in zip(tensor.shape, index, strict=True))
    return int(tensor[place])


def is_seen(
    layout: Layout,
    table: BlockTable | None,
    row: int,
    head: int,
    kv_head: int,
    query: int,
    slot: int,
) -> bool:
    """Return whether a query sees a slot, straight from the words of `BlockTable` and `Layout`."""
    own = layout.query_start[row] + query
    if slot >= layout.key_length[row] or (layout.causal and slot > own):
        return False
    if layout.key_mask is not None and not bool(layout.key_mask[row, slot]):
        return False
    if table is None:
        return True
    query_block = own // table.query_size - layout.query_start[row] // table.query_size
    far = table.reach is not None and slot <= own - entry(table.reach, row, head, query_block)
    if far and slot >= table.first:
        return False
    for place in range(entry(table.counts, row, kv_head, query_block)):
        if entry(table.indices, row, kv_head, query_block, place) == slot // table.block_size:
            skip = table.skip
            return skip is None or not entry(skip, row, head, query_block, place)
    return False


def brute_force(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    table: BlockTable | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Return attention by loops, in float64, without gradients."""
    rows, heads, length, dim = queries.shape
    group = heads // keys.shape[1]
    out = torch.zeros(rows, heads, length, values.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            kv_head = head // group
            for query in range(length):
                if not any(
                    is_seen(layout, table, row, head, kv_head, query, slot)
                    for slot in range(layout.num_slots)
                ):
                    continue
                scores, shown = [], []
                for slots, middle in _seen(layout, table, row, head, kv_head, query):
                    key, value = (x[row, kv_head, slots].double().mean(0) for x in (keys, values))
                    product = torch.dot(queries[row, head, query].double(), key)
                    bias = math.log(len(slots))
                    if slopes is not None:
                        distance = layout.query_start[row] + query - middle
                        bias -= float(slopes[head]) * distance
                    scores.append(float(product) / math.sqrt(dim) + bias)
                    shown.append(value)
                top = max(scores)
                total = sum(math.exp(score - top) for score in scores)
                for score, value in zip(scores, shown, strict=True):
                    out[row, head, query] += math.exp(score - top) / total * value
    return out


def _seen(
    layout: Layout, table: BlockTable | None, row: int, head: int, kv_head: int, query: int
) -> Iterator[tuple[list[int], float]]:
    """Yield the slots that a query sees, each alone, then the tokens of each block that counts by
    its mean; and where what is yielded lies."""
    for slot in range(layout.num_slots):
        if is_seen(layout, table, row, head, kv_head, query, slot):
            yield [slot], slot
    if table is None or not table.means:
        return
    size = table.block_size
    whole = dataclasses.replace(table, reach=None)
    for block in range((layout.query_start[row] + query) // size):
        slots = [
            slot
            for slot in range(block * size, (block + 1) * size)
            if is_seen(layout, None, row, 0, 0, query, slot)
        ]
        if slots and not is_seen(layout, whole, row, head, kv_head, query, slots[0]):
            yield slots, block * size + (size - 1) / 2
