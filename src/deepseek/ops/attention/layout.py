"""Where the queries and keys of one forward pass sit in the slots of their rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from deepseek.errors import ShapeError, describe


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Places queries and keys in slots: slot `s` of a row holds the row's `s`-th key, in a cache or
    not.

    Query `t` of row `b` sits in slot `query_start[b] + t`. Causality, windows and block tables
    speak of slots; positions (of rope) are a separate matter. All layers of one forward pass share
    one layout, so what is derived from it (masks, tables) is computed once and kept in `memo`.
    """

    query_start: tuple[int, ...]
    """Slot of the first query, per row."""
    key_length: tuple[int, ...]
    """Slots that hold a key, per row, those of this pass included."""
    num_queries: int
    """T: queries per row, padding included."""
    key_mask: Tensor | None = None
    """bool [B, S]: False where the slot holds padding; None when every slot below `key_length` is a
    token."""
    causal: bool = True
    """A query sees its own slot and earlier ones only."""
    tokens: Tensor | None = None
    """Int [B, S or more]: the token in each slot, -1 where none is known; None where states were
    given in place of tokens. What planners read that cut a text."""
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.query_start) != len(self.key_length):
            must = f"as long as query_start ({len(self.query_start)} rows)"
            raise ShapeError(describe("key_length", "Layout", must, len(self.key_length)))

    @classmethod
    def dense(
        cls,
        num_rows: int,
        length: int,
        key_mask: Tensor | None = None,
        *,
        causal: bool = True,
        tokens: Tensor | None = None,
    ) -> Layout:
        """Return the layout of a pass without a cache: query t and key t of a row share slot t."""
        return cls((0,) * num_rows, (length,) * num_rows, length, key_mask, causal, tokens)

    @property
    def num_rows(self) -> int:
        """B: rows of the batch."""
        return len(self.query_start)

    @property
    def num_slots(self) -> int:
        """S: the slots that have to be read to serve the longest row."""
        return max(self.key_length)

    @property
    def is_uniform(self) -> bool:
        """True if every row has the same start and length and no padding, so one row describes
        all."""
        same = len(set(self.query_start)) == 1 and len(set(self.key_length)) == 1
        return same and self.key_mask is None

    def query_slots(self, device: torch.device) -> Tensor:
        """Return the slot of each query, int64 [B, T]."""
        start = torch.tensor(self.query_start, device=device)
        return start[:, None] + torch.arange(self.num_queries, device=device)

    def visible(self, device: torch.device) -> Tensor:
        """Return which slots each query may see before any table: bool [B or 1, T, S], computed
        once."""
        if "visible" not in self.memo:
            self.memo["visible"] = self._visible(device)
        return self.memo["visible"]

    def _visible(self, device: torch.device) -> Tensor:
        slots = torch.arange(self.num_slots, device=device)
        if self.is_uniform:
            seen = torch.ones(1, self.num_queries, self.num_slots, dtype=torch.bool, device=device)
        else:
            length = torch.tensor(self.key_length, device=device)
            seen = (slots < length[:, None])[:, None, :].expand(-1, self.num_queries, -1)
        if self.key_mask is not None:
            seen = seen & self.key_mask[:, None, : self.num_slots]
        if self.causal:
            query = self.query_slots(device)[:1] if self.is_uniform else self.query_slots(device)
            seen = seen & (slots <= query[:, :, None])
        return seen
