"""Attention over block tables on a GPU, by PyTorch's FlexAttention: listed blocks only, with
gradients, in one fused Triton kernel.

**Never run on a GPU.** What is tested is the eager execution on a CPU, outputs, log-sum-exp and
gradients against the reference, and that the block lists hold what the mask shows. The tile sizes
and the compiled kernels are written after PyTorch 2.13's sources; `tests/ops/test_gpu_attention.py`
has the tests that run where there is a GPU.

Source: Dong et al. 2024, "Flex Attention" (2412.05496).
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

from deepseek.errors import BackendError, ConfigError, describe
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.attention.whole_blocks import cut_blocks, fill_blocks

LEAST_TILE = 16
"""Fewest queries, slots and channels that the tensor cores multiply."""
_MOST_TILE = 64
_TUNED_FOR = 128
"""Blocks that are a multiple of this run with the tile sizes that PyTorch has chosen."""

Mod = Callable[..., Tensor]


def attention_flex(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None,
    slopes: Tensor | None,
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the same as `attention_reference`, products in the dtype of the inputs.

    On a GPU it is compiled, on a CPU it runs eagerly, which makes all scores and has no gradients:
    for tests.

    Raises:
        BackendError: the device is another one, or a CPU and gradients are asked for.
        ConfigError: there is no table, or one that it does not run; says why.
    """
    keys, values = kv.dense(layout.num_slots)
    why = why_not(queries, keys, values, table)
    if table is None or why is not None:
        must = "one that the flex execution runs"
        raise ConfigError(describe("table", "attention", must, why, "Use impl='auto' or 'sdpa'"))
    size, heads = table.query_size, queries.shape[1]
    blocks = table.num_query_blocks(layout, size)
    offsets = [start % size for start in layout.query_start]
    slopes = None if slopes is None else slopes.to(queries.device)
    run = _compiled() if queries.device.type == "cuda" else _eager
    try:
        out, found = run(
            fill_blocks(queries, offsets, blocks * size),
            keys,
            values,
            score_mod=None if slopes is None else _distance(slopes, _first_slots(table, layout)),
            block_mask=_block_mask(table, layout, heads, keys.shape[1]),
            scale=scale,
            enable_gqa=heads != keys.shape[1],
            return_aux=AuxRequest(lse=return_lse),
            kernel_options=tile_sizes(table),
        )
    except NotImplementedError as error:
        must = "a GPU, or a CPU without gradients, for the flex execution"
        got, step = str(queries.device), "Use impl='auto' or 'gathered'"
        raise BackendError(describe("device", "attention", must, got, step)) from error
    lse = None if found.lse is None else cut_blocks(found.lse[..., None], offsets, queries.shape[2])
    out = cut_blocks(out, offsets, queries.shape[2])
    return out, None if lse is None else lse[..., 0]


def why_not(queries: Tensor, keys: Tensor, values: Tensor, table: BlockTable | None) -> str | None:
    """Return why it does not run this table and these shapes, or None when it does."""
    if table is None:
        return "no table"
    if table.means:
        return "a table with means"
    if queries.device.type != "cuda":
        return None
    if queries.dtype == torch.float64:
        return "float64 on a GPU"
    if min(queries.shape[-1], values.shape[-1], keys.shape[-1]) < LEAST_TILE:
        return f"heads of fewer than {LEAST_TILE} channels"
    if table.query_size % LEAST_TILE or table.block_size % LEAST_TILE:
        return f"blocks of {table.query_size} queries and {table.block_size} slots"
    return None


def pays(queries: Tensor, kv: DenseKV | PagedKV, layout: Layout, table: BlockTable) -> bool:
    """Return whether "auto" uses it: on a GPU, for a table it runs, where queries fill a tile.

    A single query, as in decoding, reads the keys once either way.
    """
    if queries.device.type != "cuda" or layout.num_queries < LEAST_TILE:
        return False
    return why_not(queries, *kv.dense(layout.num_slots), table) is None


def tile_sizes(table: BlockTable) -> FlexKernelOptions:
    """Return the tiles in which the kernels go through blocks of a table.

    PyTorch's own choice needs blocks of a multiple of 128; what the others need is written in its
    kernel (`torch/_inductor/kernel/flex`): tiles divide the blocks, and of the two tiles of a
    backward loop the outer one is a multiple of the inner one.
    """
    if table.query_size % _TUNED_FOR == 0 and table.block_size % _TUNED_FOR == 0:
        return {}
    of_queries, of_keys = (
        min(size & -size, _MOST_TILE) for size in (table.query_size, table.block_size)
    )
    inner = min(of_queries, of_keys)
    tiles = {
        "fwd_BLOCK_M": of_queries,
        "fwd_BLOCK_N": of_keys,
        "bwd_BLOCK_M1": inner,
        "bwd_BLOCK_N1": of_keys,
        "bwd_BLOCK_M2": of_queries,
        "bwd_BLOCK_N2": inner,
    }
    return tiles  # type: ignore[return-value]


@functools.cache
def _compiled() -> Callable[..., Any]:
    # whole or not at all: the eager execution in its place would make all scores
    return torch.compile(flex_attention, fullgraph=True)


def _eager(*tensors: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        # that it is not compiled
        warnings.simplefilter("ignore", UserWarning)
        return flex_attention(*tensors, **settings)


def _first_slots(table: BlockTable, layout: Layout) -> Tensor:
    """Return the slot of the first place of each row's query blocks, int64 [B]."""
    start = torch.tensor(layout.query_start, device=table.indices.device)
    return start // table.query_size * table.query_size


def _distance(slopes: Tensor, first: Tensor) -> Mod:
    """Return what adds the ALiBi bias to a score."""

    def add_distance(score: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor):
        return score - slopes[head] * (first[row] + query - slot)

    return add_distance


def _block_mask(table: BlockTable, layout: Layout, heads: int, kv_heads: int) -> BlockMask:
    """Return lists and mask of a table, kept in its memo: all layers of a pass share them."""
    key = ("flex", heads, kv_heads)
    if key not in table.memo or table.memo[key][1]() is not layout:
        made = block_mask(table, layout, heads, kv_heads)
        # held weakly: the memo may be the layout's own
        table.memo[key] = (made, weakref.ref(layout))
    return table.memo[key][0]


def block_mask(table: BlockTable, layout: Layout, heads: int, kv_heads: int) -> BlockMask:
    """Return a table as FlexAttention takes it: for each query block the key blocks it sees, and
    what is seen inside of them.

    Lists are per query head where heads differ, and as wide as there are key blocks, for the
    backward pass turns them round. Nothing is as large as queries times keys.
    """
    device = table.indices.device
    size, query_size = table.block_size, table.query_size
    listed = table.seen_blocks(layout, heads, kv_heads)
    counts = listed.sum(-1).int()
    indices = listed.int().argsort(dim=-1, descending=True, stable=True).int()
    listed = listed.expand(layout.num_rows, heads, -1, -1)
    first = _first_slots(table, layout)
    end = torch.tensor(layout.key_length, device=device)
    causal, tokens = layout.causal, layout.key_mask
    reach = table.reach
    if reach is not None:
        reach = reach.expand(layout.num_rows, heads, listed.shape[2])

    def is_seen(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        place = first[row] + query
        # the eager execution reads no lists, and so tests this mask alone
        seen = listed[row, head, query // query_size, slot // size] & (slot < end[row])
        if causal:
            seen = seen & (slot <= place)
        if tokens is not None:
            seen = seen & tokens[row, slot]
        if reach is not None:
            seen = seen & (slot > place - reach[row, head, query // query_size])
        return seen

    return BlockMask.from_kv_blocks(
        counts,
        indices,
        BLOCK_SIZE=(query_size, size),
        mask_mod=is_seen,
        seq_lengths=(listed.shape[2] * query_size, layout.num_slots),
    )
