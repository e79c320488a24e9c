"""Attention over block tables on a GPU, by PyTorch's FlexAttention: blocks that are not listed are
not computed, with gradients, in one fused Triton kernel.

**Never run on a GPU.** What is tested is the eager execution on a CPU (outputs, log-sum-exp and
gradients against the reference), PyTorch's compiled kernel for CPUs, and that the lists hold what
the mask shows. `tests/ops/test_gpu_attention.py` has tests that run where there is a GPU.

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
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from deepseek.errors import BackendError, ConfigError, describe
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.table import BlockTable

LISTED = 128
"""Queries and slots of the blocks that FlexAttention lists, whatever those of the table are: each
tile that PyTorch chooses for a GPU divides them, while its backward kernels refuse smaller ones
(`torch/_inductor/kernel/flex/flex_attention.py`, 2.13). The mask hides what a table does not list
of them."""
LEAST_QUERIES = 16
"""Fewest queries that "auto" uses it for: one that is decoded reads the keys once either way."""
LEAST_CHANNELS = 16
"""Fewest channels of a head that the tensor cores multiply."""


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
    why = why_not(queries, kv, table)
    if table is None or why is not None:
        must = "one that the flex execution runs"
        raise ConfigError(describe("table", "attention", must, why, "Use impl='auto' or 'sdpa'"))
    keys, values = kv.dense(layout.num_slots)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    run = _compiled() if queries.device.type == "cuda" else _eager
    try:
        out, found = run(
            queries,
            keys,
            values,
            score_mod=None if slopes is None else _distance(slopes, layout, queries.device),
            block_mask=_kept_mask(table, layout, heads, kv_heads),
            scale=scale,
            enable_gqa=heads != kv_heads,
            return_aux=AuxRequest(lse=return_lse),
            # the one kernel for any number of queries
            kernel_options={"BACKEND": "TRITON"},
        )
    except NotImplementedError as error:
        must = "a GPU, or a CPU without gradients, for the flex execution"
        got, step = str(queries.device), "Use impl='auto' or 'gathered'"
        raise BackendError(describe("device", "attention", must, got, step)) from error
    return out, found.lse


def why_not(queries: Tensor, kv: DenseKV | PagedKV, table: BlockTable | None) -> str | None:
    """Return why it does not run this table and these shapes, or None when it does."""
    if table is None:
        return "no table"
    if table.means:
        return "a table with means"
    if queries.device.type != "cuda":
        return None
    if queries.dtype == torch.float64:
        return "float64 on a GPU"
    values = kv.values if isinstance(kv, DenseKV) else kv.value_pages
    if min(queries.shape[-1], values.shape[-1]) < LEAST_CHANNELS:
        return f"heads of fewer than {LEAST_CHANNELS} channels on a GPU"
    return None


def pays(queries: Tensor, kv: DenseKV | PagedKV, table: BlockTable) -> bool:
    """Return whether "auto" uses it: on a GPU, for a table it runs and queries that share tiles."""
    if queries.device.type != "cuda" or queries.shape[2] < LEAST_QUERIES:
        return False
    return why_not(queries, kv, table) is None


@functools.cache
def _compiled() -> Callable[..., Any]:
    # whole or not at all: the eager execution in its place would make all scores
    return torch.compile(flex_attention, fullgraph=True)


def _eager(*tensors: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        # that it is not compiled
        warnings.simplefilter("ignore", UserWarning)
        return flex_attention(*tensors, **settings)


def _distance(slopes: Tensor, layout: Layout, device: torch.device) -> Callable[..., Tensor]:
    """Return what adds the ALiBi bias to a score."""
    slopes, start = slopes.to(device), torch.tensor(layout.query_start, device=device)

    def add_distance(
        score: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor
    ) -> Tensor:
        return score - slopes[head] * (start[row] + query - slot)

    return add_distance


def _kept_mask(table: BlockTable, layout: Layout, heads: int, kv_heads: int) -> BlockMask:
    """Return lists and mask of a table, kept in its memo: all layers of a pass share them."""
    key = ("flex", heads, kv_heads)
    if key not in table.memo or table.memo[key][1]() is not layout:
        made = block_mask(table, layout, heads, kv_heads)
        # held weakly: the memo may be the layout's own
        table.memo[key] = (made, weakref.ref(layout))
    return table.memo[key][0]


def block_mask(table: BlockTable, layout: Layout, heads: int, kv_heads: int) -> BlockMask:
    """Return a table as FlexAttention takes it: lists of the blocks in which something is listed,
    and what of them is seen.

    Lists are per query head where heads differ, and as wide as there are blocks, for the backward
    pass turns them round. Nothing is as large as queries times keys.
    """
    device = table.indices.device
    size, query_size = table.block_size, table.query_size
    seen_blocks = table.seen_blocks(layout, heads, kv_heads)
    lists = _lists(seen_blocks, table, layout)
    counts = lists.sum(-1).int()
    indices = lists.int().argsort(dim=-1, descending=True, stable=True).int()
    listed = seen_blocks.expand(layout.num_rows, heads, -1, -1)
    start = torch.tensor(layout.query_start, device=device)
    first = start // query_size
    end = torch.tensor(layout.key_length, device=device)
    causal, tokens, reach, always = layout.causal, layout.key_mask, table.reach, table.first
    if reach is not None:
        reach = reach.expand(layout.num_rows, heads, listed.shape[2])

    def is_seen(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        own = start[row] + query
        block = own // query_size - first[row]
        seen = listed[row, head, block, slot // size] & (slot < end[row])
        if causal:
            seen = seen & (slot <= own)
        if tokens is not None:
            seen = seen & tokens[row, slot]
        if reach is not None:
            seen = seen & ((slot > own - reach[row, head, block]) | (slot < always))
        return seen

    return BlockMask.from_kv_blocks(
        counts,
        indices,
        BLOCK_SIZE=LISTED,
        mask_mod=is_seen,
        seq_lengths=(layout.num_queries, layout.num_slots),
    )


def _lists(seen_blocks: Tensor, table: BlockTable, layout: Layout) -> Tensor:
    """Return in which blocks of `LISTED` queries and slots anything is listed: bool [B or 1, heads
    or 1, blocks of queries, blocks of slots]."""
    offsets = [start % table.query_size for start in layout.query_start]
    rows = offsets if len(set(offsets)) > 1 else offsets[:1]
    of_queries = torch.stack(
        [_overlap(layout.num_queries, table.query_size, seen_blocks.shape[2], at) for at in rows]
    )
    of_slots = _overlap(layout.num_slots, table.block_size, seen_blocks.shape[3], 0)
    of_queries, of_slots = (each.to(seen_blocks.device) for each in (of_queries, of_slots))
    return of_queries[:, None] @ seen_blocks.float() @ of_slots.T > 0


def _overlap(length: int, size: int, count: int, offset: int) -> Tensor:
    """Return which of `count` blocks of a table, the first of them begun `offset` places before,
    share a place with which of the blocks of `LISTED` places: float [blocks, count], 0 or 1."""
    listed = torch.arange(-(-length // LISTED))[:, None] * LISTED
    start = torch.arange(count) * size - offset
    return ((start < listed + LISTED) & (start + size > listed)).float()
