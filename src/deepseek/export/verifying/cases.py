"""What a verified model is asked: rows of tokens, how they are padded, and how they are cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deepseek.errors import FormatError, describe
from deepseek.export.formats import Ids

Side = Literal["left", "right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One question to a model and its export."""

    id: str
    """Of `deepseek verify --case`: its kind and number."""
    kind: str
    """What it looks for: `lengths`, `padding`, `cache`, …"""
    rows: tuple[tuple[int, ...], ...]
    """Tokens of each row of the batch, without padding; at least one each."""
    side: Side = "right"
    """Where rows that are shorter than the widest are padded."""
    extra: int = 0
    """Columns of padding beyond the longest row, on that side."""
    filler: int = 0
    """The id that stands in padding."""
    steps: tuple[int, ...] = ()
    """Tokens of each piece where rows are read in pieces, one behind the other through a cache, all
    rows alike; empty for one pass."""
    forks: bool = False
    """Whether every piece is read twice from the same state, first with other tokens whose answer
    is thrown away: a state must not be changed by what is read from it."""

    @property
    def width(self) -> int:
        """Columns of the batch, padding included."""
        return max(map(len, self.rows)) + self.extra

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(map(len, self.rows))

    def lead(self, row: int) -> int:
        """Columns of padding before a row's first token."""
        return self.width - len(self.rows[row]) if self.side == "left" else 0

    def arrays(self) -> tuple[Ids, Ids]:
        """Return ids and mask, int64 [rows, width] each."""
        ids = np.full((len(self.rows), self.width), self.filler, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(self.rows):
            start = self.lead(number)
            ids[number, start : start + len(row)] = row
            mask[number, start : start + len(row)] = 1
        return ids, mask

    def to_dict(self) -> dict[str, object]:
        """Return the case as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Case:
        """Return the case that `to_dict` wrote.

        Raises:
            FormatError: it is none, or one that cannot be asked.
        """
        try:
            given: dict[str, Any] = dict(values)
            rows = tuple(map(_whole_numbers, given.pop("rows")))
            case = cls(rows=rows, steps=_whole_numbers(given.pop("steps", ())), **given)
            case._check()
        except (TypeError, ValueError, KeyError) as error:
            must = f"a case as verify writes it ({error})"
            raise FormatError(describe("case", "a case file", must, dict(values))) from error
        return case

    def _check(self) -> None:
        """Raise a ValueError for a case that cannot be asked."""
        if not self.rows or min(map(len, self.rows)) < 1:
            raise ValueError("rows have at least one token")
        _whole_numbers((self.extra, self.filler))
        if self.side not in ("left", "right"):
            raise ValueError("the side is left or right")
        if not isinstance(self.id, str) or "/" in self.id:
            raise ValueError("the id is a word")
        cuts = {len(row) for row in self.rows} == {sum(self.steps)} and 0 not in self.steps
        if self.steps and not (cuts and self.extra == 0):
            raise ValueError("steps add up to every row, and nothing is padded")


def _whole_numbers(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("whole numbers from 0")
    return tuple(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """What can be asked of a model and of the reader of its export."""

    vocab_size: int
    max_tokens: int
    """Longest row."""
    max_batch: int
    pads_left: bool
    """Whether a text that is padded on its left is the same text: not where positions are learned
    one by one."""
    has_cache: bool
    boundaries: tuple[int, ...]
    """First and last id, and those with a meaning: begin, end, padding, roles of a chat."""
    outliers: tuple[int, ...]
    """Ids whose embedding is longest, shortest, or has the largest single number."""
    texts: tuple[tuple[int, ...], ...] = ()
    """Tokens of texts in many scripts; none without a tokenizer."""
