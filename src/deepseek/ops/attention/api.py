"""The one call for attention, and the choice of how it is executed."""

from __future__ import annotations

from typing import Literal, Protocol, overload

from torch import Tensor

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.ops.attention import blocked, gathered, gpu, selected, tiled
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.reference import attention_reference
from deepseek.ops.attention.sdpa import attention_sdpa
from deepseek.ops.attention.table import BlockTable

AttentionImpl = Literal["auto", "blocked", "flex", "gathered", "reference", "sdpa", "tiled"]


class Execution(Protocol):
    """One way to compute attention: `attention_reference` says what, with its arguments."""

    def __call__(
        self,
        queries: Tensor,
        kv: DenseKV | PagedKV,
        layout: Layout,
        /,
        *,
        table: BlockTable | None,
        slopes: Tensor | None,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs, and the log-sum-exp where it is asked for.

        Raises:
            ConfigError: it does not compute this; it may not compute another thing instead.
        """
        ...


ATTENTION_IMPLS: dict[str, Execution] = {
    "blocked": blocked.attention_blocked,
    "flex": gpu.attention_flex,
    "gathered": gathered.attention_gathered,
    "reference": attention_reference,
    "sdpa": attention_sdpa,
    "tiled": tiled.attention_tiled,
}


@overload
def attention(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    wanted: Tensor | None = None,
    impl: AttentionImpl = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    wanted: Tensor | None = None,
    impl: AttentionImpl = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    *,
    table: BlockTable | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    wanted: Tensor | None = None,
    impl: AttentionImpl = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention of queries over keys and values, one softmax over everything a query sees.

    Args:
        queries: [B, heads, T, key dim].
        kv: keys and values of this pass (`DenseKV`), or one layer's pages of a cache (`PagedKV`) in
            which the keys of this pass are already written. Query head h reads KV head `h // (heads
            // KV heads)`.
        layout: where queries and keys sit; decides causality and padding.
        table: which blocks each query block sees; None for all of them (dense).
        slopes: [heads], ALiBi slopes; None for no distance bias.
        scale: factor of the scores; None for `key dim ** -0.5`.
        wanted: bool [B, heads, T], the queries whose result is wanted; the others' is zeros, and
            "auto" does not compute it but where a table has means. None for all.
        impl: "auto", or an execution by name, which is used or refused, never replaced.
        return_lse: whether to return the log-sum-exp too, which `merge` needs; "sdpa" has none.

    Returns:
        [B, heads, T, value dim], in the dtype of the queries; zeros where a query sees nothing.
        With `return_lse` also the logarithm of the sum of exponentials of the scores (scaled, bias
        included) that each query sees: [B, heads, T], float32 (float64 for float64 inputs), minus
        infinity where it sees nothing. Both have gradients.

    Raises:
        BackendError: "flex" does not run on this device, or not with gradients.
        ConfigError: an unknown `impl`, or one that does not run this layout.
        ShapeError: shapes that do not fit one another.
    """
    if impl != "auto" and impl not in ATTENTION_IMPLS:
        must = f"one of auto, {', '.join(ATTENTION_IMPLS)}"
        raise ConfigError(describe("impl", "attention", must, impl))
    kv_heads = (kv.keys if isinstance(kv, DenseKV) else kv.key_pages.transpose(1, 2)).shape[1]
    if queries.dim() != 4 or queries.shape[1] % kv_heads:
        must = f"[B, heads, T, dim] with heads a multiple of the {kv_heads} KV heads"
        raise ShapeError(describe("queries", "attention", must, list(queries.shape)))
    if (queries.shape[0], queries.shape[2]) != (layout.num_rows, layout.num_queries):
        must = f"of {layout.num_rows} rows and {layout.num_queries} queries, as the layout says"
        raise ShapeError(describe("queries", "attention", must, list(queries.shape)))
    if wanted is not None and wanted.shape != queries.shape[:3]:
        must = f"of shape {list(queries.shape[:3])}, one for each query"
        raise ShapeError(describe("wanted", "attention", must, list(wanted.shape)))
    scale = float(queries.shape[-1] ** -0.5) if scale is None else scale
    if wanted is not None and bool(wanted.all()):
        wanted = None
    if impl == "auto" and wanted is not None and not return_lse and selected.suits(table):
        return selected.attention_selected(
            queries, kv, layout, wanted=wanted, table=table, slopes=slopes, scale=scale
        )
    if impl == "auto":
        impl = choose(queries, kv, layout, table, slopes, return_lse)
    out, lse = ATTENTION_IMPLS[impl](
        queries, kv, layout, table=table, slopes=slopes, scale=scale, return_lse=return_lse
    )
    if wanted is not None:
        out = out.masked_fill(~wanted[..., None], 0.0)
        lse = None if lse is None else lse.masked_fill(~wanted, float("-inf"))
    return out if lse is None else (out, lse)


def choose(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    table: BlockTable | None = None,
    slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Literal["blocked", "flex", "gathered", "reference", "sdpa", "tiled"]:
    """Return the name of the execution that "auto" uses; arguments as in `attention`."""
    if table is not None and gpu.pays(queries, kv, table):
        return "flex"
    if tiled.pays(queries, kv, table, return_lse):
        return "tiled"
    if table is not None:
        if gathered.suits(table, slopes) and (return_lse or gathered.pays(table, layout)):
            return "gathered"
    elif isinstance(kv, DenseKV):
        pays = return_lse or blocked.pays(queries, kv)
        if pays and blocked.suits(kv, layout, None, slopes):
            return "blocked"
    return "reference" if return_lse else "sdpa"
