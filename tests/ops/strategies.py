"""Hypothesis strategies for layouts and block tables."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from deepseek.ops.attention import BlockTable, Layout


@st.composite
def layouts(draw: st.DrawFn, longest: int = 9) -> Layout:
    """Draw a layout of up to three ragged rows, cached or not, padded or not, causal or not."""
    rows = draw(st.integers(1, 3))
    length = draw(st.integers(1, longest))
    if draw(st.booleans()):
        starts = tuple(draw(st.integers(0, longest + 2)) for _ in range(rows))
        ends = tuple(start + draw(st.integers(1, length)) for start in starts)
        return Layout(starts, ends, length)
    mask = None
    if draw(st.booleans()):
        seed = draw(st.integers(0, 2**20))
        mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    return Layout.dense(rows, length, mask, causal=draw(st.booleans()))


@st.composite
def tables(
    draw: st.DrawFn,
    layout: Layout,
    heads: int,
    kv_heads: int,
    blocks: tuple[int, ...] = (1, 2, 3, 4, 16),
    means: bool = True,
) -> BlockTable:
    """Draw a table for a layout, with shared dimensions, lists for a part of a block, skip bits,
    reaches and (unless they are not wanted) means now and then."""
    block = draw(st.sampled_from(blocks))
    query_block = draw(st.sampled_from([None, *(n for n in (1, 4, 16) if block % n == 0)]))
    query_blocks = BlockTable.num_query_blocks(layout, query_block or block)
    key_blocks = BlockTable.num_key_blocks(layout, block)
    rows = draw(st.sampled_from([1, layout.num_rows]))
    listed_heads = draw(st.sampled_from([1, kv_heads]))
    width = draw(st.integers(1, key_blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    noise = torch.rand(rows, listed_heads, query_blocks, key_blocks, generator=generator)
    shape = (rows, listed_heads, query_blocks)
    skip = reach = None
    if draw(st.booleans()):
        skip = torch.rand(rows, heads, query_blocks, width, generator=generator) < 0.3
    if draw(st.booleans()):
        reach_heads = draw(st.sampled_from([1, heads]))
        most = layout.num_slots + 2
        reach = torch.randint(1, most, (rows, reach_heads, query_blocks), generator=generator).int()
    return BlockTable(
        indices=noise.argsort(-1)[..., :width].int(),
        counts=torch.randint(0, width + 1, shape, generator=generator).int(),
        block_size=block,
        skip=skip,
        reach=reach,
        first=draw(st.integers(0, 3)),
        query_block=query_block,
        means=means and draw(st.booleans()),
    )
