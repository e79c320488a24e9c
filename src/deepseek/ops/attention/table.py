"""The block table: which key blocks each query block sees. Planners make it, kernels execute it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek.errors import ShapeError, describe
from deepseek.ops.attention.layout import Layout


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTable:
    """A list of key blocks for every query block, one list per KV head.

    Blocks are aligned to slots: block `j` holds slots `j * block_size … (j + 1) * block_size - 1`,
    which is also the page size of the cache. Query block `i` of row `b` holds the queries whose
    slots lie in block `query_start[b] // query_size + i` of `query_size` slots, so that one token
    being decoded is a query block of its own.

    A query sees the slot of a listed block if the layout lets it (causality, padding), no skip bit
    removes the block for its head, and the slot lies within its head's reach. Everything seen goes
    through **one** softmax: a table that lists every block is dense attention. Dimensions of size 1
    are shared by all rows or heads.
    """

    indices: Tensor
    """int32 [B or 1, KV heads or 1, query blocks, K]: listed key blocks, each at most once; entries
    from `counts` on are ignored."""
    counts: Tensor
    """int32 [B or 1, KV heads or 1, query blocks]: how many entries of `indices` hold."""
    block_size: int
    """Slots per block."""
    skip: Tensor | None = None
    """bool [B or 1, query heads, query blocks, K]: True where this head ignores the listed
    block."""
    reach: Tensor | None = None
    """int32 [B or 1, query heads or 1, query blocks or 1]: a query in slot s sees slots above `s -
    reach`, and the first ones."""
    first: int = 0
    """Slots at the start that lie within every reach."""
    query_block: int | None = None
    """Queries that share a list: a divisor of `block_size`; None for as many."""
    means: bool = False
    """Whether the blocks before a query's own that its head does not see count by the means of
    their keys and values (`append_means`), in the same softmax."""
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    """What executions derive from the table (masks); lives as long as the table."""

    def __post_init__(self) -> None:
        if self.block_size % self.query_size:
            must = f"a divisor of block_size ({self.block_size})"
            raise ShapeError(describe("query_block", "BlockTable", must, self.query_block))

    @property
    def query_size(self) -> int:
        """Slots of a query block."""
        return self.query_block or self.block_size

    @classmethod
    def of_lists(
        cls, listed: Sequence[Sequence[Sequence[int]]], block_size: int, device: torch.device
    ) -> BlockTable:
        """Return the table, the same for all heads, of the key blocks of each query block of each
        row; every row has as many query blocks."""
        counts = torch.tensor(
            [[len(blocks) for blocks in row] for row in listed], dtype=torch.int32
        )
        indices = torch.zeros(*counts.shape, int(counts.max()), dtype=torch.int32)
        for row, blocks_of_row in enumerate(listed):
            for at, blocks in enumerate(blocks_of_row):
                indices[row, at, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        return cls(indices[:, None].to(device), counts[:, None].to(device), block_size)

    @staticmethod
    def num_query_blocks(layout: Layout, query_size: int) -> int:
        """Return how many query blocks of so many slots the longest row of `layout` touches."""
        spans = [
            (start + layout.num_queries - 1) // query_size - start // query_size + 1
            for start in layout.query_start
        ]
        return max(spans)

    @staticmethod
    def num_key_blocks(layout: Layout, block_size: int) -> int:
        """Return how many key blocks cover the slots of `layout`."""
        return -(-layout.num_slots // block_size)

    def check(self, layout: Layout, num_heads: int, num_kv_heads: int) -> None:
        """Raise if the table does not fit the layout and the heads, or lists a block twice or
        outside the slots.

        Raises:
            ShapeError: names the field that is wrong.
        """
        wanted = self.check_shapes(layout, num_heads, num_kv_heads)
        if int(self.counts.min()) < 0 or int(self.counts.max()) > wanted[3]:
            must = f"between 0 and {wanted[3]}, the width of indices"
            raise ShapeError(describe("counts", "BlockTable", must, self.counts.max().item()))
        indices, held = torch.broadcast_tensors(self.indices, self.held())
        key_blocks = self.num_key_blocks(layout, self.block_size)
        listed = indices[held]
        if listed.numel() and not (int(listed.min()) >= 0 and int(listed.max()) < key_blocks):
            must = f"between 0 and {key_blocks - 1}, the blocks that hold keys"
            raise ShapeError(describe("indices", "BlockTable", must, listed.max().item()))
        unheld = torch.arange(wanted[3], device=held.device) + key_blocks
        ordered = torch.where(held, indices, unheld.to(indices.dtype)).sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ShapeError(
                describe("indices", "BlockTable", "listed once per query block", "a block twice")
            )

    def check_shapes(
        self, layout: Layout, num_heads: int, num_kv_heads: int
    ) -> tuple[int, int, int, int]:
        """Raise if the shapes do not fit the layout and the heads; return that of whole indices.

        Raises:
            ShapeError: names the field that is wrong.
        """
        query_blocks = self.num_query_blocks(layout, self.query_size)
        wanted = (layout.num_rows, num_kv_heads, query_blocks, self.indices.shape[-1])
        _check_shape("indices", self.indices, wanted)
        _check_shape("counts", self.counts, wanted[:3])
        if self.skip is not None:
            _check_shape("skip", self.skip, (layout.num_rows, num_heads, *wanted[2:]))
        if self.reach is not None:
            _check_shape("reach", self.reach, (layout.num_rows, num_heads, query_blocks))
        return wanted

    def visible(self, layout: Layout, num_heads: int, num_kv_heads: int) -> Tensor:
        """Return which slots each query sees under the table and the layout: bool [B or 1, heads or
        1, T, S].

        This is the specification of the table; only the reference and the masked path may afford
        it.
        """
        device = self.indices.device
        listed = self._listed(layout, num_heads, num_kv_heads)
        key_block = torch.arange(layout.num_slots, device=device) // self.block_size
        seen = listed[..., key_block] & layout.visible(device)[:, None]
        if self.reach is not None:
            query_slots, query_block = self._places(layout)
            reach = self.reach.expand(layout.num_rows, -1, self.counts.shape[-1])
            reach = reach.gather(2, query_block[:, None].expand(-1, reach.shape[1], -1))
            slots = torch.arange(layout.num_slots, device=device)
            near = slots > query_slots[:, None, :, None] - reach[..., None]
            seen = seen & (near | (slots < self.first))
        return seen

    def unseen(self, layout: Layout, num_heads: int, num_kv_heads: int) -> Tensor:
        """Return which blocks before its own each query does not see: bool [B or 1, heads or 1, T,
        key blocks]."""
        query_slots, _ = self._places(layout)
        blocks = torch.arange(
            self.num_key_blocks(layout, self.block_size), device=self.indices.device
        )
        before = blocks < query_slots[..., None] // self.block_size
        return ~self._listed(layout, num_heads, num_kv_heads) & before[:, None]

    def _places(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the slot of each query and its place among the query blocks, both [B, T]."""
        slots = layout.query_slots(self.indices.device)
        return slots, slots // self.query_size - slots[:, :1] // self.query_size

    def _listed(self, layout: Layout, num_heads: int, num_kv_heads: int) -> Tensor:
        """Return which blocks each query's list holds: bool [B, heads or 1, T, key blocks]."""
        blocks = self.seen_blocks(layout, num_heads, num_kv_heads)
        blocks = blocks.expand(layout.num_rows, -1, -1, -1)
        _, query_block = self._places(layout)
        place = query_block[:, None, :, None].expand(-1, blocks.shape[1], -1, blocks.shape[-1])
        return blocks.gather(2, place)

    def seen_blocks(self, layout: Layout, num_heads: int, num_kv_heads: int) -> Tensor:
        """Return which key blocks each query block sees, skip bits taken off: bool [B or 1, heads
        or 1, query blocks, key blocks]."""
        indices, listed = torch.broadcast_tensors(self.indices.long().clamp(min=0), self.held())
        if self.skip is not None or indices.shape[1] > 1:
            group = num_heads // num_kv_heads
            listed = listed.expand(-1, num_kv_heads, -1, -1).repeat_interleave(group, dim=1)
            indices = indices.expand(-1, num_kv_heads, -1, -1).repeat_interleave(group, dim=1)
        if self.skip is not None:
            rows = max(listed.shape[0], self.skip.shape[0])
            listed = listed.expand(rows, -1, -1, -1) & ~self.skip
            indices = indices.expand(rows, -1, -1, -1)
        key_blocks = self.num_key_blocks(layout, self.block_size)
        hits = torch.zeros(
            *listed.shape[:-1], key_blocks + 1, dtype=torch.int32, device=listed.device
        )
        target = torch.where(listed, indices, key_blocks).clamp(max=key_blocks)
        hits.scatter_(-1, target, 1)
        return hits[..., :key_blocks] > 0

    def held(self) -> Tensor:
        """Return which entries of `indices` count: bool, broadcastable to it."""
        place = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return place < self.counts[..., None]


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    fits = tensor.dim() == len(wanted) and all(
        size in (1, want) for size, want in zip(tensor.shape[:2], wanted[:2], strict=True)
    )
    tail_fits = all(
        size == want or (name == "reach" and size == 1)
        for size, want in zip(tensor.shape[2:], wanted[2:], strict=False)
    )
    if not (fits and tail_fits):
        must = f"of shape {list(wanted)} (rows and heads may be 1)"
        raise ShapeError(describe(name, "BlockTable", must, list(tensor.shape)))
