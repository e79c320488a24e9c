"""Attention over what a block table lists, or over everything, with gradients, by our own kernels:
what training runs on a CPU.

A page of keys meets the queries that see it, gathered by 16 whatever lists they come from; softmax
is taken as pages come, and made again in the backward pass, so that memory grows with the text
alone. Products are of bfloat16 by AMX tiles where there are such, or else of float32; sums are of
float32.

Source: Dao et al., "FlashAttention" (2205.14135), section 3.1; the kernels stand in
`cpu/tiled.h`, who works on what in `ops/cpu/tiled_attention.cpp`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.means import block_means
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.cpu import chosen_instruction_set, kernels, why_missing
from deepseek.ops.hardware import computed_in

DENSE_BLOCK = 64
"""Slots of a page where there is no table."""
LEAST_QUERIES = 64
"""Fewest queries that "auto" packs keys and values for."""
LEAST_DENSE = 128
"""The same where there is no table, which PyTorch's products do well too."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_HIDDEN = -1e30
"""Added to the score of a slot that nobody sees; finite, so that no difference of two is NaN."""


def attention_tiled(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None,
    slopes: Tensor | None,
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the same as `attention_reference`; the log-sum-exp has gradients too.

    Raises:
        ConfigError: the kernels are not here, or tensors are not on the CPU in float32 or bfloat16
            (of autocast, where it is on).
        ShapeError: a list names a block twice, or one that is not there.
    """
    if why := why_not(queries):
        step = "Use attention='auto' or 'sdpa'"
        raise ConfigError(
            describe("impl", "attention", "one that runs here", f"tiled: {why}", step)
        )
    keys, values = kv.dense(layout.num_slots)
    dtype = computed_in(queries)
    keys, values = keys.to(dtype), values.to(dtype)
    if table is not None:
        table.check_shapes(layout, queries.shape[1], keys.shape[1])
    question = _question(layout, table)
    _hide_padding(question, layout)
    if slopes is not None:
        question |= {"slopes": slopes.float(), "place": torch.arange(layout.num_slots).float()}
    if table is not None and table.means:
        keys, values = _add_means(question, keys, values, layout, table)
    out, lse = _Tiled.apply(  # type: ignore[misc]
        queries.to(dtype).contiguous(),
        keys.contiguous(),
        values.contiguous(),
        {**question, "scale": scale, "dtype": DTYPES[dtype]},
    )
    return out.to(queries.dtype), lse if return_lse else None


def why_not(queries: Tensor) -> str | None:
    """Return why queries cannot be attended so, or None."""
    dtype = computed_in(queries)
    if queries.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {queries.device}"
    if dtype not in DTYPES:
        return f"it computes in float32 and bfloat16, not in {dtype}"
    return why_missing()


def pays(queries: Tensor, kv: DenseKV | PagedKV, table: BlockTable | None, wants_lse: bool) -> bool:
    """Return whether it is the fastest on this processor: by a table, or for the log-sum-exp; and
    without either, with gradients in bfloat16 where there are tiles."""
    length = queries.shape[2]
    # a graph that is being traced has no memory to point at
    if length < LEAST_QUERIES or why_not(queries) or torch.compiler.is_compiling():
        return False
    if table is not None or wants_lse:
        return True
    if length < LEAST_DENSE or computed_in(queries) != torch.bfloat16 or isinstance(kv, PagedKV):
        return False
    wants = torch.is_grad_enabled() and any(
        each.requires_grad for each in (queries, kv.keys, kv.values)
    )
    return wants and chosen_instruction_set() == "amx"


def _question(layout: Layout, table: BlockTable | None) -> dict[str, Any]:
    """Return what the kernels are told of the layout and the table; see `tiled` in bind.cpp."""
    said: dict[str, Any] = {
        "query_start": _int32(torch.tensor(layout.query_start)),
        "key_length": _int32(torch.tensor(layout.key_length)),
        "is_causal": layout.causal,
        "block": DENSE_BLOCK,
        "query_size": DENSE_BLOCK,
        "mean_from": -1,
        "width": 0,
        "first": 0,
    }
    if table is None:
        return said
    said |= {
        "indices": _int32(table.indices),
        "counts": _int32(table.counts),
        "block": table.block_size,
        "query_size": table.query_size,
        "width": table.indices.shape[-1],
        "first": table.first,
    }
    if table.skip is not None:
        said["skip"] = table.skip.contiguous().numpy().view(np.uint8)
    if table.reach is not None:
        said["reach"] = _int32(table.reach)
    return said


def _int32(numbers: Tensor) -> np.ndarray:
    return numbers.to(torch.int32).contiguous().numpy()


def _add_means(
    question: dict[str, Any], keys: Tensor, values: Tensor, layout: Layout, table: BlockTable
) -> tuple[Tensor, Tensor]:
    """Return keys and values with the means of their blocks behind them, from a block's start on,
    and tell the question what they weigh and where they stand."""
    size, slots = table.block_size, keys.shape[2]
    means = block_means(keys, values, layout, size)
    blocks = means.count.shape[-1]
    spare = blocks * size - slots
    bias = question.get("bias", torch.zeros(1, slots))
    weight = means.count.clamp(min=1).log().masked_fill(means.count == 0, _HIDDEN)
    rows = max(len(bias), len(weight))
    parts = (pad(bias, (0, spare)).expand(rows, -1), weight.expand(rows, -1))
    question |= {"bias": torch.cat(parts, 1), "mean_from": blocks * size}
    if "place" in question:
        middles = torch.arange(blocks) * size + (size - 1) / 2
        question["place"] = torch.cat([pad(question["place"], (0, spare)), middles])
    return (
        torch.cat([pad(keys, (0, 0, 0, spare)), means.keys], 2),
        torch.cat([pad(values, (0, 0, 0, spare)), means.values], 2),
    )


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, question: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        out = queries.new_empty(*queries.shape[:-1], values.shape[-1])
        lse = queries.new_empty(queries.shape[:-1], dtype=torch.float32)
        _run("forward", question, (queries, keys, values), {"out": out, "lse": lse})
        ctx.save_for_backward(queries, keys, values, out, lse)
        ctx.question = question
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, out, lse = ctx.saved_tensors
        gradient, of_lse = gradients
        assert gradient is not None
        found = [torch.empty_like(each) for each in (queries, keys, values)]
        tensors = {"out": out, "lse": lse, "gradient": gradient.contiguous()}
        tensors |= zip(("to_queries", "to_keys", "to_values"), found, strict=True)
        if of_lse is not None:
            tensors["lse_gradient"] = of_lse.float().contiguous()
        _run("backward", ctx.question, (queries, keys, values), tensors)
        return found[0], found[1], found[2], None


def block_peaks(queries: Tensor, keys: Tensor, layout: Layout, scale: float) -> Tensor:
    """Return the largest score of each query in each block of 64 slots, of what it sees: float32
    [B, heads, T, blocks], minus infinity where it sees nothing of a block.

    Args:
        queries: [B, heads, T, dim], of which `why_not` gives no reason.
        keys: [B, KV heads, S, dim], in the same dtype.
        layout: where they sit.
        scale: factor of the scores.
    """
    question = _question(layout, None)
    hidden = _hide_padding(question, layout)
    blocks = BlockTable.num_key_blocks(layout, DENSE_BLOCK)
    peaks = torch.full((*queries.shape[:-1], blocks), -torch.inf)
    inputs = (queries.contiguous(), keys.contiguous(), keys)
    said = {**question, "scale": scale, "dtype": DTYPES[queries.dtype]}
    _run("peaks", said, inputs, {"out": peaks})
    return peaks.masked_fill_(peaks < _HIDDEN / 2, -torch.inf) if hidden else peaks


def _hide_padding(question: dict[str, Any], layout: Layout) -> bool:
    """Tell the question which slots are padding; return whether there may be any."""
    if layout.key_mask is None:
        return False
    seen = layout.key_mask[:, : layout.num_slots]
    question["bias"] = torch.zeros(seen.shape).masked_fill(~seen, _HIDDEN)
    return True


def _run(
    which: str,
    question: dict[str, Any],
    inputs: tuple[Tensor, Tensor, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Call the kernels; tensors are contiguous and stay with us until it is over."""
    queries, keys, values = inputs
    rows, heads, length, dim = queries.shape
    if 0 in (rows, heads, length):
        for each in tensors.values():
            each.zero_()
        return
    said = dict(question)
    if "bias" in said:
        said["bias"] = said["bias"].contiguous().numpy()
    for name in ("slopes", "place"):
        if name in said:
            said[name] = said[name].data_ptr()
    said |= {"rows": rows, "heads": heads, "queries": length, "dim": dim}
    said |= {"kv_heads": keys.shape[1], "slots": keys.shape[2], "value_dim": values.shape[-1]}
    said |= {"queries_at": queries.data_ptr(), "keys_at": keys.data_ptr()}
    said |= {"values_at": values.data_ptr()}
    said |= {name: each.data_ptr() for name, each in tensors.items()}
    threads = torch.get_num_threads()
    native = _kernels(chosen_instruction_set(), threads, os.getpid())
    try:
        getattr(native, which)(said)
    except ValueError as error:
        must = "one that BlockTable.check lets through"
        raise ShapeError(describe("table", "attention", must, str(error))) from error


@functools.lru_cache(maxsize=4)
def _kernels(isa: str, threads: int, process: int) -> Any:
    """Return what computes with so many threads; threads do not outlive a fork, so each process has
    its own."""
    return kernels().TiledAttention(isa, threads)
