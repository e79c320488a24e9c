"""Which bytes of an old bundle stand for the same as those of a new file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from deepseek.hub import Bundle
from deepseek.hub.safetensors import TensorEntry

_MAX_TEXT_BYTES = 64 << 20
"""Larger files that hold no tensors are not compared line by line."""
_LEAST_RUN_BYTES = 256
"""Shorter runs of equal lines cost more as copies than they save."""
_MOST_RUNS = 1000
_KINDS: Mapping[str, tuple[str, ...]] = {
    "I8": ("bytes",),
    "U8": ("bytes",),
    "I32": ("nibbles", "bytes"),  # a layout packs codes of four or eight bits in words
    "F16": ("words2",),
    "BF16": ("words2",),
    "F32": ("words4",),
}


class Span(NamedTuple):
    """A stretch of a new file."""

    length: int
    source: str
    """The old file that has bytes for the same; empty where none has."""
    offset: int
    """Of the first of them."""
    kinds: tuple[str, ...] = ()
    """Ways to write their difference."""


def spans(old: Bundle, new: Bundle, name: str) -> Iterator[Span]:
    """Yield the stretches of a file of the new bundle, from its first byte to its last.

    Tensors stand for those of their name, dtype and size; other files for the file of their name,
    line by line.
    """
    entries = {key: entry for key, entry in new.tensors.items() if entry.file == name}
    if entries:
        return _of_tensors(old, new, name, entries)
    return _of_lines(old.path / name, new.path / name, name)


def _of_tensors(
    old: Bundle, new: Bundle, name: str, entries: Mapping[str, TensorEntry]
) -> Iterator[Span]:
    ordered = sorted(entries.items(), key=lambda pair: (pair[1].offset, pair[1].num_bytes))
    head = ordered[0][1].offset
    first = min((each.offset for each in old.tensors.values() if each.file == name), default=0)
    yield Span(head, name, 0) if first == head else Span(head, "", 0)
    for key, entry in ordered:
        if not entry.num_bytes:
            continue
        same = old.tensors.get(key)
        if same is None or (same.dtype, same.num_bytes) != (entry.dtype, entry.num_bytes):
            yield Span(entry.num_bytes, "", 0)
        else:
            yield Span(entry.num_bytes, same.file, same.offset, _KINDS.get(entry.dtype, ()))


def _of_lines(old: Path, new: Path, name: str) -> Iterator[Span]:
    size = new.stat().st_size
    if not old.is_file() or max(size, old.stat().st_size) > _MAX_TEXT_BYTES:
        yield Span(size, "", 0)
        return
    found = list(_runs(old.read_bytes(), new.read_bytes(), name))
    yield from found if len(found) <= _MOST_RUNS else [Span(size, "", 0)]


def _runs(old: bytes, new: bytes, name: str) -> Iterator[Span]:
    """Yield runs of lines that both files have, and what is between them."""
    places: dict[bytes, int] = {}
    lines, at = old.splitlines(keepends=True), 0
    starts = []
    for number, line in enumerate(lines):
        places.setdefault(line, number)
        starts.append(at)
        at += len(line)
    fresh, begin, length, following = 0, 0, 0, -1
    for line in new.splitlines(keepends=True):
        goes_on = 0 <= following < len(lines) and lines[following] == line
        if not goes_on:
            if length >= _LEAST_RUN_BYTES:
                if fresh:
                    yield Span(fresh, "", 0)
                yield Span(length, name, begin)
                fresh = 0
            else:
                fresh += length
            length, following = 0, places.get(line, -1)
            if following < 0:
                fresh += len(line)
                continue
            begin = starts[following]
        length += len(line)
        following += 1
    if length < _LEAST_RUN_BYTES:
        fresh, length = fresh + length, 0
    if fresh:
        yield Span(fresh, "", 0)
    if length:
        yield Span(length, name, begin)
