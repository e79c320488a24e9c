"""Segment attention: a text is cut where its thoughts end, and a query sees its own segment, the
one before it, and the beginning of every other."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV

if TYPE_CHECKING:
    from deepseek.data import Tokenizer

_ENDS = (".", "!", "?", "。", "！", "？")
_CLOSING = "\"'”’)]*_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments(Config):
    """How long the segments of a text are, and what a query sees of those before its own."""

    least: int = 256
    """Tokens of a segment at least, except for the last one."""
    most: int = 1024
    """Tokens of a segment at most."""
    before: int = 1
    """Segments before a query's own that it sees whole."""
    links: int = 32
    """Tokens at the beginning of every earlier segment that it sees."""
    first: int = 1
    """Blocks at the start of the text that it sees."""
    block_size: int = 64
    """Slots of a block, the page size of the cache."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            must = f"from 1 to most ({self.most})"
            raise ConfigError(describe("least", "Segments", must, self.least))
        for name, lowest in (("before", 0), ("links", 0), ("first", 0), ("block_size", 1)):
            if getattr(self, name) < lowest:
                must = f"at least {lowest}"
                raise ConfigError(describe(name, "Segments", must, getattr(self, name)))


class Boundaries:
    """Where the tokens of a vocabulary let a text be cut.

    A paragraph begins behind a blank line, or with a heading (`#` at the begin of a line); a
    sentence begins behind `.`, `!` or `?`, quotes or brackets that close, and white space.
    Abbreviations are taken for ends of sentences.

    Args:
        pieces: the text of each token, by its id.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self._blank = torch.tensor([bool(piece) and not piece.strip() for piece in pieces])
        tails = [piece[len(piece.rstrip()) :] for piece in pieces]
        self._newlines = torch.tensor([tail.count("\n") for tail in tails])
        shown = [piece.rstrip().rstrip(_CLOSING) for piece in pieces]
        self._ends = torch.tensor([text.endswith(_ENDS) for text in shown])
        self._heads = torch.tensor([piece.lstrip().startswith("#") for piece in pieces])
        self._goes_on = torch.tensor([piece[:1].isdigit() or not piece for piece in pieces])

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Boundaries:
        """Return those of a tokenizer's vocabulary."""
        ids = range(tokenizer.vocab_size)
        return cls([tokenizer.decode([each], skip_special_tokens=False) for each in ids])

    def starts(self, tokens: Tensor, least: int, most: int) -> list[int]:
        """Return where the segments of a text begin, ascending.

        A segment ends before the first paragraph that begins `least` tokens or more behind its own
        begin, or the first sentence half way from `least` to `most` or later, or is `most` tokens
        long, whichever comes first. Whether one begins at a token depends on that token and those
        before it alone.

        Args:
            tokens: int [tokens]; an id outside the vocabulary is no boundary.
            least: tokens of a segment.
            most: tokens of a segment.
        """
        paragraphs, sentences = self._places(tokens)
        found = [0]
        while True:
            begin = found[-1]
            following = min(
                _at_or_after(paragraphs, begin + least, begin + most),
                _at_or_after(sentences, begin + (least + most + 1) // 2, begin + most),
            )
            if following >= len(tokens):
                return found
            found.append(following)

    def _places(self, tokens: Tensor) -> tuple[list[int], list[int]]:
        """Return where paragraphs and where sentences begin."""
        tokens = tokens.long().cpu()
        known = (tokens >= 0) & (tokens < len(self._blank))
        ids = tokens.clamp(0, len(self._blank) - 1)
        blank, ends, heads = (each[ids] & known for each in (self._blank, self._ends, self._heads))
        newlines = self._newlines[ids] * known
        last, before = _shifted(newlines, 1), _shifted(newlines, 2)
        after_blank = _shifted(blank, 1)
        paragraph = (last > 1) | (after_blank & (last > 0) & (before > 0)) | (heads & (last > 0))
        sentence = _shifted(ends, 1) | (after_blank & _shifted(ends, 2))
        sentence &= ~self._goes_on[ids]
        shown = known & ~blank
        return _where(paragraph & shown), _where(sentence & shown)


class SegmentPlanner:
    """Lets a query see its own segment, those before it within a number, the first blocks, and the
    beginning of every earlier segment, where its topic is told: all through one softmax. What is
    seen of a long text grows with its segments, by a beginning each.

    What is listed are blocks: of a segment or a beginning every block that it touches, with what
    else is in it. The queries of a block share a list. Their own segment is that of the first of
    them; one that begins inside a block counts from the next block on. So no later token has a part
    in what a query sees, and a text is seen the same way whole, in chunks and token by token.

    Args:
        boundaries: where a text may be cut: `Boundaries.of(tokenizer)`.
        segments: how long they are, and what is seen of them.
    """

    def __init__(self, boundaries: Boundaries, segments: Segments | None = None) -> None:
        self.boundaries = boundaries
        self.segments = segments or Segments()

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return what the queries [B, heads, T, dim] of a layer see; None where that is all.

        Raises:
            ConfigError: the model was given states in place of tokens.
        """
        if layout.num_slots <= (self.segments.before + 1) * self.segments.least:
            return None
        key = ("segments", id(self))
        if key not in layout.memo:
            layout.memo[key] = self._table(layout, queries.device)
        return layout.memo[key]

    def _table(self, layout: Layout, device: torch.device) -> BlockTable:
        size = self.segments.block_size
        query_blocks = BlockTable.num_query_blocks(layout, size)
        last = BlockTable.num_key_blocks(layout, size) - 1
        listed: list[list[list[int]]] = []
        for row, start in enumerate(layout.query_start):
            starts = self.starts(layout, row)
            # A row shorter than the longest has surplus query blocks, which hold no query.
            own = [min(start // size + at, last) for at in range(query_blocks)]
            listed.append([seen_blocks(self.segments, starts, block) for block in own])
        return BlockTable.of_lists(listed, size, device)

    def starts(self, layout: Layout, row: int) -> list[int]:
        """Return the slots in which the segments of a row begin, ascending; padding on its left is
        before the first.

        Raises:
            ConfigError: the model was given states in place of tokens.
        """
        if layout.tokens is None:
            must = "given: a text is cut by its tokens"
            raise ConfigError(describe("input_ids", "SegmentPlanner", must, "inputs_embeds"))
        first = 0
        if layout.key_mask is not None:
            first = int(layout.key_mask[row].int().argmax())
        tokens = layout.tokens[row, first : layout.key_length[row]]
        found = self.boundaries.starts(tokens, self.segments.least, self.segments.most)
        return [first + start for start in found]


def seen_blocks(segments: Segments, starts: Sequence[int], own: int) -> list[int]:
    """Return which blocks the queries of block `own` see, in order.

    Args:
        segments: what is seen.
        starts: slots in which segments begin, ascending.
        own: a block; segments that begin behind its first slot have no part in it.
    """
    size = segments.block_size
    place = max(bisect.bisect_right(starts, own * size) - 1, 0)
    begin = starts[max(place - segments.before, 0)] // size
    text = starts[0] // size
    seen = {*range(text, text + segments.first), *range(begin, own + 1), own}
    if segments.links:
        for start in starts[: place + 1]:
            seen.update(range(start // size, (start + segments.links - 1) // size + 1))
    return sorted(block for block in seen if block <= own)


def _at_or_after(places: list[int], wanted: int, limit: int) -> int:
    """Return the first of ascending places that is not before `wanted`, at most `limit`."""
    at = bisect.bisect_left(places, wanted)
    return min(places[at], limit) if at < len(places) else limit


def _where(flags: Tensor) -> list[int]:
    return flags.nonzero()[:, 0].tolist()


def _shifted(values: Tensor, by: int) -> Tensor:
    """Return values of so many places earlier, zeros at the start."""
    return torch.cat((torch.zeros_like(values[:by]), values[:-by]))
