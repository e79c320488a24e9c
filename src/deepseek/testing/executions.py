"""`check_attention`: an execution of attention computes what the reference says, or refuses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from deepseek.errors import ConfigError, VerifyError, describe
from deepseek.ops.attention import BlockTable, DenseKV, Execution, Layout, PagedKV
from deepseek.ops.attention.reference import attention_reference

BLOCKS = (16, 32, 64, 128)
"""Slots of the blocks of the tables."""
HEADS = ((2, 2), (6, 2), (4, 1))
"""Query and KV heads: groups of 1, 3 and 4."""
_CHANNELS = 16
_PAGE = 16
_BOUNDS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of values drawn from a normal distribution, as a share of the largest one where that is above
1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionProof:
    """What was found of an execution; everything that must hold held."""

    served: tuple[str, ...]
    """Questions that were answered rightly."""
    refused: tuple[str, ...]
    """Questions that were refused by a ConfigError."""
    has_lse: bool
    """It returned the log-sum-exp to every question it served."""
    largest_error: float
    """Of outputs, log-sum-exp and gradients, as a share of what is allowed."""

    @property
    def text(self) -> str:
        """The proof as a person reads it."""
        lse = "with" if self.has_lse else "without"
        return (
            f"attention: {len(self.served)} questions served, {len(self.refused)} refused, {lse} "
            f"log-sum-exp, at most {self.largest_error:.0%} of the error allowed"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """What an execution is asked."""

    name: str
    layout: Layout
    heads: tuple[int, int]
    """Query and KV heads."""
    table: BlockTable | None = None
    slopes: Tensor | None = None
    is_paged: bool = False
    """Keys and values come as pages in any order."""

    def draw(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Return queries, keys and values: normal numbers, the same each time."""
        generator = torch.Generator().manual_seed(0)
        rows, layout = self.layout.num_rows, self.layout
        sizes = (self.heads[0], layout.num_queries), *2 * ((self.heads[1], layout.num_slots),)
        return [
            torch.randn(rows, heads, length, _CHANNELS, generator=generator).to(device, dtype)
            for heads, length in sizes
        ]


def check_attention(
    execution: Execution,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    has_gradients: bool = True,
) -> AttentionProof:
    """Hold an execution of attention to its contract, and return what was found.

    It is asked for dense attention and for tables with blocks of 16 to 128 slots: every block,
    windows, ragged lists, skip bits, shared lists, means; for rows that are whole, padded, of
    different lengths, that go on from a paged cache, or have one query; with 1, 3 and 4 query heads
    a KV head; with ALiBi. It refuses a question by a ConfigError, or answers as
    `attention_reference` does: outputs, log-sum-exp (or refuses that alone) and gradients of all.
    What is given stays as it was, and a key behind a query changes nothing for it.

    Args:
        execution: to be judged; has the signature of `attention_reference`.
        device: where tensors and tables lie.
        dtype: of queries, keys and values; the reference computes in float32.
        has_gradients: whether it must have them.

    Raises:
        VerifyError: names the first question in which something does not hold, and what was got.
    """
    served, refused, errors, has_lse = [], [], [], True
    for question in questions(device):
        trial = _Trial(execution, question, device, dtype, has_gradients)
        try:
            errors.append(trial.judge(return_lse=True))
        except ConfigError:
            try:
                errors.append(trial.judge(return_lse=False))
            except ConfigError:
                refused.append(question.name)
                continue
            has_lse = False
        served.append(question.name)
    if not served:
        must = "for some question"
        raise VerifyError(describe("answers", "execution", must, "a refusal of every one"))
    return AttentionProof(
        served=tuple(served), refused=tuple(refused), has_lse=has_lse, largest_error=max(errors)
    )


def questions(device: str = "cpu") -> Iterator[Question]:
    """Yield what every execution is asked, tables on a device."""
    for at, size in enumerate(BLOCKS):
        for place, make in enumerate((_dense, *_TABLES)):
            heads = HEADS[(at + place) % len(HEADS)]
            question = make(size, heads)
            name = f"{question.name}, blocks of {size}, {heads[0]} heads on {heads[1]}"
            yield dataclasses.replace(_on(question, device), name=name)


def _dense(size: int, heads: tuple[int, int]) -> Question:
    """Without a table; the size says how long, and every other one is not causal."""
    causal = size in BLOCKS[::2]
    return Question("dense", Layout.dense(2, 2 * size + 1, causal=causal), heads)


def _every_block(size: int, heads: tuple[int, int]) -> Question:
    layout = Layout.dense(1, 2 * size + 3)
    return Question("every block", layout, heads, _lists(layout, size, heads, all_of_them=True))


def _window(size: int, heads: tuple[int, int]) -> Question:
    """A reach that differs by head and ends inside a block, and first slots that it does not
    hide."""
    layout = Layout.dense(2, 3 * size)
    reach = torch.arange(heads[0])[None, :, None] * 3 + size // 2 + 1
    table = _lists(layout, size, heads, all_of_them=True)
    return Question("window", layout, heads, dataclasses.replace(table, reach=reach.int(), first=3))


def _ragged_lists(size: int, heads: tuple[int, int]) -> Question:
    layout = Layout.dense(2, 3 * size - 1)
    return Question("ragged lists", layout, heads, _lists(layout, size, heads))


def _ragged_rows(size: int, heads: tuple[int, int]) -> Question:
    """Rows of different lengths that go on from a cache, from the middle of a block."""
    starts, counts = (3, size + 5, 2 * size), (size + 2, 7, size)
    ends = tuple(start + count for start, count in zip(starts, counts, strict=True))
    layout = Layout(starts, ends, size + 2)
    return Question("ragged rows", layout, heads, _lists(layout, size, heads), is_paged=True)


def _padded(size: int, heads: tuple[int, int]) -> Question:
    """Padding on the left: the first queries of row 0 see nothing."""
    mask = torch.ones(2, 2 * size, dtype=torch.bool)
    mask[0, : size // 2] = False
    layout = Layout.dense(2, 2 * size, mask)
    return Question("padded", layout, heads, _lists(layout, size, heads))


def _skipping(size: int, heads: tuple[int, int]) -> Question:
    layout = Layout.dense(2, 3 * size)
    table = _lists(layout, size, heads, all_of_them=True)
    shape = (1, heads[0], *table.indices.shape[2:])
    skip = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    return Question("skip bits", layout, heads, dataclasses.replace(table, skip=skip))


def _narrow(size: int, heads: tuple[int, int]) -> Question:
    """Lists of 16 queries, half a block or less but for the smallest."""
    layout = Layout((5,), (2 * size + 5,), 2 * size)
    return Question("lists of 16 queries", layout, heads, _lists(layout, size, heads, queries=16))


def _sloped(size: int, heads: tuple[int, int]) -> Question:
    layout = Layout((size + 1,), (2 * size + 9,), size + 8)
    slopes = torch.linspace(0.1, 0.6, heads[0])
    return Question("ALiBi", layout, heads, _lists(layout, size, heads), slopes)


def _meaning(size: int, heads: tuple[int, int]) -> Question:
    layout = Layout.dense(1, 3 * size)
    table = dataclasses.replace(_lists(layout, size, heads), means=True)
    return Question("means", layout, heads, table)


def _both_ways(size: int, heads: tuple[int, int]) -> Question:
    """One list for all rows and heads."""
    layout = Layout.dense(2, 2 * size + 1, causal=False)
    table = _lists(layout, size, heads)
    shared = {"indices": table.indices[:1, :1], "counts": table.counts[:1, :1]}
    return Question("not causal", layout, heads, dataclasses.replace(table, **shared))


def _one_query(size: int, heads: tuple[int, int]) -> Question:
    layout = Layout((2 * size, size - 1), (2 * size + 1, size), 1)
    return Question("one query", layout, heads, _lists(layout, size, heads), is_paged=True)


_TABLES = (
    _every_block,
    _window,
    _ragged_lists,
    _ragged_rows,
    _padded,
    _skipping,
    _narrow,
    _sloped,
    _meaning,
    _both_ways,
    _one_query,
)


def _lists(
    layout: Layout,
    size: int,
    heads: tuple[int, int],
    *,
    all_of_them: bool = False,
    queries: int | None = None,
) -> BlockTable:
    """Return lists of blocks in random order, and random counts from 1 on unless all are wanted."""
    generator = torch.Generator().manual_seed(size)
    blocks = BlockTable.num_key_blocks(layout, size)
    shape = (layout.num_rows, heads[1], BlockTable.num_query_blocks(layout, queries or size))
    order = torch.rand(*shape, blocks, generator=generator).argsort(-1).int()
    counts = torch.randint(1, blocks + 1, shape, generator=generator).int()
    if all_of_them:
        counts = torch.full_like(counts, blocks)
    table = BlockTable(order, counts, size, query_block=queries)
    table.check(layout, *heads)
    return table


def _on(question: Question, device: str) -> Question:
    """Return a question with its tensors on a device."""

    def moved(noun: Layout | BlockTable) -> dict[str, Tensor]:
        held = {each.name: getattr(noun, each.name) for each in dataclasses.fields(noun)}
        return {name: each.to(device) for name, each in held.items() if isinstance(each, Tensor)}

    layout = dataclasses.replace(question.layout, **moved(question.layout), memo={})
    table, slopes = question.table, question.slopes
    if table is not None:
        table = dataclasses.replace(table, **moved(table), memo={})
    slopes = None if slopes is None else slopes.to(device)
    return dataclasses.replace(question, layout=layout, table=table, slopes=slopes)


@dataclasses.dataclass(frozen=True)
class _Trial:
    execution: Execution
    question: Question
    device: str
    dtype: torch.dtype
    has_gradients: bool

    def judge(self, *, return_lse: bool) -> float:
        """Return the largest share of the error allowed.

        Raises:
            ConfigError: it refused.
            VerifyError: it breaks its contract.
        """
        given = self.question.draw(self.device, self.dtype)
        wanted = self._reference(given)
        leaves = [each.clone().requires_grad_(self.has_gradients) for each in given]
        found = self._run(leaves, return_lse)
        share = self._compare(found, wanted[:2])
        for name, old, new in zip(_GIVEN, given, leaves, strict=True):
            if not torch.equal(old, new.detach()):
                self._fail(name, "left as they were", "changed values")
        if self.has_gradients:
            made = self._gradients(found, leaves)
            # the reference knows no gradients of what was not returned
            truth = wanted[2] if return_lse else self._reference(given, with_lse=False)[2]
            for name, one, other in zip(_GIVEN, made, truth, strict=True):
                share = max(share, self._share(f"gradient of {name}", one, other))
        if self.question.layout.causal:
            self._change_what_comes_after(given, found[0])
        return share

    def _run(self, tensors: Sequence[Tensor], return_lse: bool) -> tuple[Tensor, Tensor | None]:
        queries, keys, values = tensors
        asked = self.question
        try:
            found = self.execution(
                queries,
                _paged(keys, values) if asked.is_paged else DenseKV(keys, values),
                asked.layout,
                table=asked.table,
                slopes=asked.slopes,
                scale=_CHANNELS**-0.5,
                return_lse=return_lse,
            )
        except ConfigError:
            raise
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            self._fail("call", "without an error, or refused by a ConfigError", got, error)
        if not isinstance(found, tuple) or len(found) != 2:
            self._fail("result", "outputs and log-sum-exp (or None)", type(found).__name__)
        if (found[1] is not None) != return_lse:
            must = "a tensor" if return_lse else "None, as it was not asked for"
            self._fail("log-sum-exp", must, type(found[1]).__name__)
        return found

    def _reference(
        self, given: Sequence[Tensor], *, with_lse: bool = True
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return outputs, log-sum-exp and gradients, computed from the same numbers in float32."""
        leaves = [each.detach().float().clone().requires_grad_() for each in given]
        asked = self.question
        out, lse = attention_reference(
            leaves[0],
            DenseKV(*leaves[1:]),
            asked.layout,
            table=asked.table,
            slopes=asked.slopes,
            scale=_CHANNELS**-0.5,
            return_lse=True,
        )
        assert lse is not None
        return out, lse, self._gradients((out, lse if with_lse else None), leaves)

    def _gradients(
        self, found: tuple[Tensor, Tensor | None], leaves: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradients of a random sum of outputs and of what log-sum-exp is finite."""
        out, lse = found
        generator = torch.Generator().manual_seed(1)
        total = (out.float() * torch.randn(out.shape, generator=generator).to(out.device)).sum()
        if lse is not None:
            weight = torch.randn(lse.shape, generator=generator).to(lse.device)
            total = total + (torch.where(lse.isfinite(), lse, 0.0) * weight).sum()
        try:
            return torch.autograd.grad(total, leaves)
        except RuntimeError as error:
            self._fail("gradients", "there", str(error).splitlines()[0], error)

    def _compare(self, found: tuple[Tensor, Tensor | None], wanted: tuple[Tensor, Tensor]) -> float:
        out, lse = found
        if (out.shape, out.dtype) != (wanted[0].shape, self.dtype):
            got = f"{list(out.shape)}, {out.dtype}"
            self._fail("outputs", f"{list(wanted[0].shape)}, {self.dtype}", got)
        share = self._share("outputs", out, wanted[0])
        if lse is None:
            return share
        if (lse.shape, lse.dtype) != (wanted[1].shape, torch.float32):
            got = f"{list(lse.shape)}, {lse.dtype}"
            self._fail("log-sum-exp", f"{list(wanted[1].shape)}, torch.float32", got)
        blind = wanted[1].isinf()
        if not torch.equal(lse == -torch.inf, blind):
            self._fail("log-sum-exp", "minus infinity where a query sees nothing", "another")
        shown = (torch.where(blind, 0.0, each) for each in (lse, wanted[1]))
        return max(share, self._share("log-sum-exp", *shown))

    def _change_what_comes_after(self, given: Sequence[Tensor], out: Tensor) -> None:
        """Replace the keys and values behind the middle query of each row."""
        layout, half = self.question.layout, self.question.layout.num_queries // 2
        queries, keys, values = (each.clone() for each in given)
        for row, start in enumerate(layout.query_start):
            for each in (keys, values):
                each[row, :, start + half + 1 :].neg_().add_(3.0)
        again, _ = self._run((queries, keys, values), False)
        before = (each[:, :, : half + 1].detach() for each in (again, out))
        self._share("outputs after a change of later keys", *before)

    def _share(self, name: str, found: Tensor, expected: Tensor) -> float:
        """Return the largest error as a share of what is allowed.

        Raises:
            VerifyError: it is larger, or a value is NaN.
        """
        bound = _BOUNDS[self.dtype] * max(1.0, float(expected.detach().abs().max()))
        error = (found.detach().double() - expected.detach().double()).abs()
        largest = float(error.nan_to_num(nan=torch.inf).max())
        if largest > bound:
            at = [int(each) for each in torch.unravel_index(error.argmax(), error.shape)]
            self._fail(name, f"within {bound:.2g} of the reference", f"{largest:.3g} off at {at}")
        return largest / bound

    def _fail(self, name: str, must: str, got: object, cause: Exception | None = None) -> NoReturn:
        where = f"attention, {self.question.name}"
        raise VerifyError(describe(name, where, must, got)) from cause


_GIVEN = ("queries", "keys", "values")


def _paged(keys: Tensor, values: Tensor) -> PagedKV:
    """Return keys and values [B, KV heads, S, dim] as shuffled pages, with gradients."""
    missing = -keys.shape[2] % _PAGE
    order = torch.randperm(
        keys.shape[0] * ((keys.shape[2] + missing) // _PAGE),
        generator=torch.Generator().manual_seed(3),
    )

    def pages(states: Tensor) -> Tensor:
        filled = torch.nn.functional.pad(states, (0, 0, 0, missing)).unflatten(2, (-1, _PAGE))
        return filled.permute(0, 2, 3, 1, 4).flatten(0, 1)[order.to(states.device)]

    table = order.argsort().view(keys.shape[0], -1).int().to(keys.device)
    return PagedKV(pages(keys), pages(values), table, first_page=None)
