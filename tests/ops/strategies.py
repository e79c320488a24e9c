"""Hypothesis strategies for layouts and block tables."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from deepseek.ops.attention import BlockTable, Layout


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw a layout of up to three ragged rows, cached or not, padded or not, causal or not."""
    rows = draw(st.integers(1, 3))
    length = draw(st.integers(1, 9))
    if draw(st.booleans()):
        starts = tuple(draw(st.integers(0, 11)) for _ in range(rows))
        ends = tuple(start + draw(st.integers(1, length)) for start in starts)
        return Layout(starts, ends, length)
    mask = None
    if draw(st.booleans()):
        mask = torch.tensor([[draw(st.booleans()) for _ in range(length)] for _ in range(rows)])
    return Layout.dense(rows, length, mask, causal=draw(st.booleans()))


@st.composite
def tables(draw: st.DrawFn, layout: Layout, heads: int, kv_heads: int) -> BlockTable:
    """Draw a table for a layout, with shared dimensions, skip bits, reaches and means now and
    then."""
    block = draw(st.sampled_from([1, 2, 3, 4, 16]))
    query_blocks = BlockTable.num_query_blocks(layout, block)
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
        reach = torch.randint(1, 12, (rows, reach_heads, query_blocks), generator=generator).int()
    return BlockTable(
        indices=noise.argsort(-1)[..., :width].int(),
        counts=torch.randint(0, width + 1, shape, generator=generator).int(),
        block_size=block,
        skip=skip,
        reach=reach,
        first=draw(st.integers(0, 3)),
        means=draw(st.booleans()),
    )
