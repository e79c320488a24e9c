"""The paged key/value cache: memory in pages, a page table per row, and the writes into it.

Which pages a row gets is policy and belongs to the server; here is the memory. The cache of one
process is the special case of one contiguous page table, which is read without a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.errors import CapacityError, ShapeError, describe
from deepseek.ops.attention.layout import Layout

PAGE_SIZE = 64


class KVShape(NamedTuple):
    """What one layer stores for one token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False
    """True when a value is the first `value_dim` channels of its key (latent attention): stored
    once."""

    @property
    def num_values(self) -> int:
        """Numbers stored for one token."""
        return self.num_kv_heads * (self.key_dim + (0 if self.values_in_keys else self.value_dim))


@dataclasses.dataclass(frozen=True, eq=False)
class DenseKV:
    """Keys [B, KV heads, S, key dim] and values [B, KV heads, S, value dim] of a pass without a
    cache."""

    keys: Tensor
    values: Tensor

    def dense(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first `num_slots` slots."""
        return self.keys[:, :, :num_slots], self.values[:, :, :num_slots]


@dataclasses.dataclass(frozen=True, eq=False)
class PagedKV:
    """The pages of one layer, and the table that says which of them are whose.

    `key_pages` is [pages, page size, KV heads, key dim], `value_pages` the same with the value dim;
    entry `p` of row `b` of `page_table`, int32 [B, pages per row], is the page that holds slots `p
    * page_size …` of that row.
    """

    key_pages: Tensor
    value_pages: Tensor
    page_table: Tensor
    first_page: int | None
    """First page of row 0 when the rows' pages follow one another without a gap: readable as one
    tensor."""
    choices: dict[int, Any] = dataclasses.field(default_factory=dict, repr=False)
    """The newest choice of routed attention in a page, by the page's number."""

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.key_pages.shape[1]

    def dense(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first `num_slots` slots as [B, KV heads, S, dim]; a view
        when contiguous."""
        keys = self._read(self.key_pages, num_slots)
        if self.value_pages.data_ptr() == self.key_pages.data_ptr():
            return keys, keys[..., : self.value_pages.shape[-1]]
        return keys, self._read(self.value_pages, num_slots)

    def in_rows(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of a contiguous table as views [B, slots, KV heads, dim].

        Raises:
            ShapeError: the pages of the rows do not follow one another.
        """
        if self.first_page is None:
            must = "contiguous to be read as rows"
            raise ShapeError(describe("page_table", "PagedKV", must, self.page_table.tolist()))
        return self._in_rows(self.key_pages), self._in_rows(self.value_pages)

    def _read(self, pages: Tensor, num_slots: int) -> Tensor:
        if self.first_page is not None:
            return self._in_rows(pages)[:, :num_slots].transpose(1, 2)
        per_row = -(-num_slots // self.page_size)
        held = pages[self.page_table[:, :per_row].reshape(-1).long()]
        held = held.reshape(-1, per_row * self.page_size, *pages.shape[2:])
        return held[:, :num_slots].transpose(1, 2)

    def _in_rows(self, pages: Tensor) -> Tensor:
        """Return contiguous pages as [B, slots, KV heads, dim], without a copy.

        `as_strided` in place of slicing and viewing: the step of decoding comes here four times a
        layer.
        """
        rows, per_row = self.page_table.shape
        page, slot, head, channel = pages.stride()
        size = (rows, per_row * self.page_size, *pages.shape[2:])
        start = pages.storage_offset() + (self.first_page or 0) * page
        return pages.as_strided(size, (per_row * page, slot, head, channel), start)

    def write(self, keys: Tensor, values: Tensor | None, layout: Layout) -> None:
        """Store keys [B, KV heads, T, dim] (and values, unless they lie in the keys) in the
        layout's query slots."""
        self._write(self.key_pages, keys, layout)
        if values is not None:
            self._write(self.value_pages, values, layout)

    def _write(self, pages: Tensor, new: Tensor, layout: Layout) -> None:
        start, length = layout.query_start[0], layout.num_queries
        is_full = layout.is_uniform and start + length == layout.key_length[0]
        if self.first_page is not None and is_full:
            self._in_rows(pages)[:, start : start + length].copy_(new.transpose(1, 2))
            return
        held, places = self._places(layout)
        pages.view(-1, *pages.shape[2:])[places] = new.transpose(1, 2)[held].to(pages.dtype)

    def _places(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return which queries are tokens, bool [B, T], and where in the pages each of them goes.

        What a padded batch has past a row's tokens goes nowhere: the pages behind them may be
        another row's.
        """
        key = ("places", id(self.page_table), self.page_size)
        if key not in layout.memo:
            device = self.page_table.device
            slots = layout.query_slots(device)
            held = slots < torch.tensor(layout.key_length, device=device)[:, None]
            entry = (slots // self.page_size).clamp(max=self.page_table.shape[1] - 1)
            page = self.page_table.gather(1, entry).long()
            places = (page * self.page_size + slots % self.page_size)[held]
            # the table is kept, so that its id stays its own as long as the memo
            layout.memo[key] = (held, places, self.page_table)
        return layout.memo[key][:2]


class KVCache:
    """The paged cache of a whole model for a batch of rows, allocated once.

    A forward pass calls `place` (where the new tokens go), every layer writes its pages, then
    `advance` makes the tokens count. A pass that fails in between leaves the lengths, and so the
    content, as they were.
    """

    def __init__(
        self, layers: Sequence[PagedKV], lengths: Sequence[int], tokens: Tensor | None = None
    ) -> None:
        self.layers = list(layers)
        self.lengths = list(lengths)
        if tokens is None:
            shape = (len(self.lengths), self.capacity)
            device = self.layers[0].page_table.device
            tokens = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.tokens = tokens
        """int32 [rows, capacity]: the token in each slot, -1 where none is known."""

    @classmethod
    def contiguous(
        cls,
        shapes: Sequence[KVShape],
        num_rows: int,
        max_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = PAGE_SIZE,
    ) -> KVCache:
        """Return an empty cache with room for `max_tokens` tokens in each of `num_rows` rows, one
        page table for all."""
        per_row = -(-max_tokens // page_size)
        table = torch.arange(num_rows * per_row, dtype=torch.int32, device=device).view(
            num_rows, per_row
        )
        pages = (num_rows * per_row, page_size)
        try:
            layers = [_empty(shape, pages, table, dtype, device) for shape in shapes]
        except (RuntimeError, MemoryError) as error:
            token_bytes = sum(shape.num_values for shape in shapes) * dtype.itemsize
            must = f"small enough for memory ({token_bytes:,} bytes a token)"
            step = "Use fewer rows or a shorter context"
            got = f"{num_rows} rows of {max_tokens} tokens"
            raise CapacityError(describe("size", "KVCache", must, got, step)) from error
        return cls(layers, [0] * num_rows)

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return len(self.lengths)

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.layers[0].page_size

    @property
    def capacity(self) -> int:
        """Tokens that fit in one row."""
        return self.layers[0].page_table.shape[1] * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages of all layers."""
        total = 0
        for layer in self.layers:
            total += layer.key_pages.nbytes
            if layer.value_pages.data_ptr() != layer.key_pages.data_ptr():
                total += layer.value_pages.nbytes
        return total

    def place(
        self, num_queries: int, counts: Sequence[int] | None = None, tokens: Tensor | None = None
    ) -> Layout:
        """Return the layout of the next `num_queries` slots of every row, of which row b's first
        `counts[b]` are tokens: those of `tokens` [rows, num_queries], where they are known.

        Raises:
            CapacityError: a row has no room for them.
            ShapeError: `counts` does not fit the rows.
        """
        counts = [num_queries] * self.num_rows if counts is None else list(counts)
        if len(counts) != self.num_rows:
            must = f"one count for each of the {self.num_rows} rows"
            raise ShapeError(
                describe("input_ids", "a forward pass with a cache", must, len(counts))
            )
        lengths = tuple(length + count for length, count in zip(self.lengths, counts, strict=True))
        if max(lengths) > self.capacity:
            must = f"at most {self.capacity} tokens a row"
            step = "Ask new_cache for a larger max_tokens"
            raise CapacityError(describe("length", "KVCache", must, max(lengths), step))
        for row, (start, stop) in enumerate(zip(self.lengths, lengths, strict=True)):
            self.tokens[row, start:stop] = -1 if tokens is None else tokens[row, : stop - start]
        known = None if tokens is None else self.tokens
        return Layout(tuple(self.lengths), lengths, num_queries, tokens=known)

    def advance(self, layout: Layout) -> None:
        """Make the tokens that were written under `layout` part of the content."""
        self.lengths = list(layout.key_length)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the newest tokens: row b keeps its first `lengths[b]`."""
        for new, old in zip(lengths, self.lengths, strict=True):
            if not 0 <= new <= old:
                raise ShapeError(
                    describe("lengths", "KVCache.truncate", f"between 0 and {old}", new)
                )
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> KVCache:
        """Return the cache of some rows, in ascending order, over the same memory; this one must
        not be used again.

        A contiguous cache is compacted (the kept rows move together once), so that it stays
        readable without a copy.
        """
        rows = list(rows)
        if rows != sorted(set(rows)) or not rows or rows[-1] >= self.num_rows:
            must = f"ascending row numbers below {self.num_rows}"
            raise ShapeError(describe("rows", "KVCache.select", must, rows))
        lengths = [self.lengths[row] for row in rows]
        layers = [self._select(layer, rows) for layer in self.layers]
        return KVCache(layers, lengths, self.tokens[rows])

    def _select(self, layer: PagedKV, rows: list[int]) -> PagedKV:
        if layer.first_page is None:
            return dataclasses.replace(layer, page_table=layer.page_table[rows])
        per_row = layer.page_table.shape[1]
        in_keys = layer.value_pages.data_ptr() == layer.key_pages.data_ptr()
        choices = {
            layer.first_page + new * per_row + page: layer.choices[moved]
            for new, old in enumerate(rows)
            for page in range(per_row)
            if (moved := layer.first_page + old * per_row + page) in layer.choices
        }
        for new, old in enumerate(rows):
            if new == old:
                continue
            source, target = layer.first_page + old * per_row, layer.first_page + new * per_row
            used = -(-self.lengths[old] // layer.page_size)
            for pages in [layer.key_pages] if in_keys else [layer.key_pages, layer.value_pages]:
                pages[target : target + used] = pages[source : source + used]
        table = layer.page_table[: len(rows)]
        return dataclasses.replace(layer, page_table=table, choices=choices)


def _empty(
    shape: KVShape,
    pages: tuple[int, int],
    table: Tensor,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PagedKV:
    size = (*pages, shape.num_kv_heads)
    keys = torch.zeros(*size, shape.key_dim, dtype=dtype, device=device)
    if shape.values_in_keys:
        return PagedKV(keys, keys[..., : shape.value_dim], table, 0)
    return PagedKV(keys, torch.zeros(*size, shape.value_dim, dtype=dtype, device=device), table, 0)
