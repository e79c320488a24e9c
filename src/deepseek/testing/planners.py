"""`check_planner`: what a planner lists is causal, and the same in any parts of a text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from deepseek.errors import ShapeError, VerifyError, describe
from deepseek.models import Planner
from deepseek.ops.attention import BlockTable, DenseKV, KVCache, KVShape, Layout, PagedKV
from deepseek.ops.attention.reference import attention_reference, visible

_BOUND = 1e-5
_ROWS, _HEADS, _KV_HEADS, _DIM = 2, 4, 2, 64
_STEPS = 9
"""Tokens that are planned one by one, at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerProof:
    """What was found of a planner; everything that must hold held."""

    share_seen: float
    """Of the keys before its queries: what it lets them see of the text it was tried with."""
    largest_error: float
    """Of outputs and gradients, where two ways must give the same."""


def check_planner(
    planner: Planner, full: Planner, *, length: int = 400, layer: int = 0
) -> PlannerProof:
    """Hold a planner to its contract, and return what was found.

    Its tables fit their layouts (`BlockTable.check`); it leaves what it reads as it was. With
    `full` attention is dense to 1e-5, outputs and gradients. Tokens behind a query, whatever they
    are, change nothing for it. A text that comes whole, in chunks through a cache, token by token,
    and in a batch with a row of another length gives the same outputs.

    Args:
        planner: to be judged.
        full: one of the same kind with a budget that covers everything.
        length: tokens of the text it is tried with: more than it sees.
        layer: the layer it is asked for.

    Raises:
        VerifyError: says what does not hold, and what was got.
    """
    text = _Text(planner, layer, length)
    largest = text.is_dense_with(full)
    whole, seen = text.whole()
    for after in (length // 3, length // 2, length - 2):
        largest = max(largest, text.without_future(after, whole))
    for size in (length // 3, 77):
        parts = [*range(0, length - _STEPS, size), *range(length - _STEPS, length + 1)]
        largest = max(largest, text.in_parts(parts, whole))
    return PlannerProof(share_seen=seen, largest_error=largest)


class _Text:
    """Queries, keys and values of a text, and the planner that is tried with them."""

    def __init__(self, planner: Planner, layer: int, length: int) -> None:
        self.planner, self.layer, self.length = planner, layer, length
        self.queries, self.keys, self.values = _draw(length, seed=0)

    def is_dense_with(self, full: Planner) -> float:
        """Return how far outputs and gradients with a full budget are from dense ones."""
        results = []
        for planner in (full, None):
            leaves = [
                each.clone().requires_grad_() for each in (self.queries, self.keys, self.values)
            ]
            layout, kv = Layout.dense(_ROWS, self.length), DenseKV(leaves[1], leaves[2])
            table = None if planner is None else self._plan(planner, leaves[0], kv, layout)
            out = _attend(leaves[0], kv, layout, table)
            direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
            results.append((out, *torch.autograd.grad(out, leaves, direction)))
        names = ("outputs", *(f"gradients of {name}" for name in ("queries", "keys", "values")))
        shares = [
            self._same(f"{name} with a full budget", one, other, "dense attention")
            for name, one, other in zip(names, *results, strict=True)
        ]
        return max(shares)

    def whole(self) -> tuple[Tensor, float]:
        """Return the outputs of the whole text, and which share of it is seen."""
        layout, kv = Layout.dense(_ROWS, self.length), DenseKV(self.keys, self.values)
        table = self._plan(self.planner, self.queries, kv, layout)
        seen = visible(layout, table, _HEADS, _KV_HEADS, self.queries.device)
        dense = visible(layout, None, _HEADS, _KV_HEADS, self.queries.device)
        share = float(seen.double().mean() / dense.double().mean())
        return _attend(self.queries, kv, layout, table), share

    def without_future(self, after: int, whole: Tensor) -> float:
        """Return how far outputs up to a slot change when everything behind it does."""
        others = _draw(self.length, seed=after)
        parts = [
            torch.cat([old[:, :, : after + 1], 3 * new[:, :, after + 1 :]], 2)
            for old, new in zip((self.queries, self.keys, self.values), others, strict=True)
        ]
        layout, kv = Layout.dense(_ROWS, self.length), DenseKV(parts[1], parts[2])
        table = self._plan(self.planner, parts[0], kv, layout)
        out = _attend(parts[0], kv, layout, table)[:, :, : after + 1]
        other = "those of the same text with other tokens behind it"
        return self._same(f"outputs up to slot {after}", out, whole[:, :, : after + 1], other)

    def in_parts(self, borders: Sequence[int], whole: Tensor) -> float:
        """Return how far outputs in parts, through a cache, are from those of the whole text; the
        last part comes again in a batch whose second row is shorter."""
        shape = [KVShape(_KV_HEADS, _DIM, _DIM)]
        cache = KVCache.contiguous(shape, _ROWS, self.length, dtype=self.keys.dtype)
        largest, other = 0.0, "those of the whole text"
        for start, stop in itertools.pairwise(borders):
            found = self._step(cache, [start] * _ROWS, stop - start)
            wanted = whole[:, :, start:stop]
            name = f"outputs of slots {start} to {stop - 1}, given a part"
            largest = max(largest, self._same(name, found, wanted, other))
        starts = [self.length - 1, self.length - 1 - self.length // 5]
        cache.truncate(starts)
        found = self._step(cache, starts, 1)
        wanted = torch.stack([whole[row, :, at : at + 1] for row, at in enumerate(starts)])
        name = f"outputs of slots {starts} in one batch"
        return max(largest, self._same(name, found, wanted, other))

    def _step(self, cache: KVCache, starts: Sequence[int], count: int) -> Tensor:
        def part(states: Tensor) -> Tensor:
            rows = zip(states, starts, strict=True)
            return torch.stack([row[:, start : start + count] for row, start in rows])

        layout, queries = cache.place(count), part(self.queries)
        cache.layers[0].write(part(self.keys), part(self.values), layout)
        table = self._plan(self.planner, queries, cache.layers[0], layout)
        out = _attend(queries, cache.layers[0], layout, table)
        cache.advance(layout)
        return out

    def _plan(
        self, planner: Planner, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return the table of a planner, checked."""
        read = (queries, *kv.dense(layout.num_slots))
        before = [each.detach().clone() for each in read]
        table = self._call(planner, lambda: planner.plan(self.layer, queries, kv, layout))
        after = (queries, *kv.dense(layout.num_slots))
        if not all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
            self._fail(planner, "queries, keys and values", "left as they were", "changed ones")
        if table is not None and not isinstance(table, BlockTable):
            self._fail(planner, "plan", "a BlockTable or None", type(table).__name__)
        if table is not None:
            try:
                table.check(layout, _HEADS, _KV_HEADS)
            except ShapeError as error:
                self._fail(planner, "table", "one that fits its layout", str(error), error)
        return table

    def _call(self, planner: Planner, plan: Callable[[], BlockTable | None]) -> BlockTable | None:
        try:
            return plan()
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            self._fail(planner, "plan", "made without an error", got, error)

    def _same(self, name: str, found: Tensor, wanted: Tensor, other: str) -> float:
        """Return the largest difference, relative to the largest value where that is above 1."""
        error = (found.detach() - wanted.detach()).abs() / wanted.detach().abs().max().clamp(min=1)
        largest = float(error.nan_to_num(nan=torch.inf).max())
        if largest > _BOUND:
            self._fail(self.planner, name, f"{other}, within {_BOUND:g}", f"{largest:.3g} off")
        return largest

    def _fail(
        self,
        planner: Planner,
        name: str,
        must: str,
        got: object,
        cause: Exception | None = None,
    ) -> NoReturn:
        raise VerifyError(describe(name, type(planner).__name__, must, got)) from cause


def _draw(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(_ROWS, heads, length, _DIM, generator=generator)

    return normal(_HEADS), normal(_KV_HEADS), normal(_KV_HEADS)


def _attend(
    queries: Tensor, kv: DenseKV | PagedKV, layout: Layout, table: BlockTable | None
) -> Tensor:
    out, _ = attention_reference(queries, kv, layout, table=table, slopes=None, scale=_DIM**-0.5)
    return out
