"""Documents laid into rows of one length, so that a window neither begins nor ends in the middle of
one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deepseek.data.corpus import Document

_OPEN_ROWS = 64
"""Rows that wait for a document that fits."""


def packed(documents: Iterable[Document], length: int, fill: int) -> Iterator[Document]:
    """Yield rows of `length - 1` tokens, each of whole documents and then of filling that is not
    learned, and at last one token of filling; so each window of `length` tokens of their corpus
    (`Windows`) is one row, and the token behind it.

    A document goes where it leaves the least room, among the last 64 rows that are not full (best
    fit). One that is longer than a row is cut, and each piece is a document. The first token of a
    document is never learned: it follows from nothing.

    Args:
        documents: each with its targets, or all to be learned.
        length: tokens of a window, at least 2.
        fill: the token that fills.
    """
    width = length - 1
    rows: list[tuple[list[int], list[bool]]] = []
    for document in documents:
        for tokens, targets in _pieces(document, width):
            fitting = [row for row in rows if len(row[0]) + len(tokens) <= width]
            row = max(fitting, key=lambda row: len(row[0]), default=None)
            if row is None:
                row = ([], [])
                rows.append(row)
            row[0].extend(tokens)
            row[1].extend(targets)
            if len(row[0]) == width:
                rows.remove(row)
                yield Document(*row)
            elif len(rows) > _OPEN_ROWS:
                yield _filled(rows.pop(0), width, fill)
    for row in rows:
        yield _filled(row, width, fill)
    yield Document([fill], [False])


def one_a_row(documents: Iterable[Document], length: int, fill: int) -> Iterator[Document]:
    """Yield each document as a row like those of `packed`, alone in it: for models whose tokens see
    all of a row. One that is longer than a row is cut before its last token, which ends it.

    Args:
        documents: all of each to be learned.
        length: tokens of a window, at least 2.
        fill: the token that fills.
    """
    width = length - 1
    for document in documents:
        tokens = list(document.tokens)
        if len(tokens) > width:
            tokens = [*tokens[: width - 1], tokens[-1]]
        yield _filled((tokens, [False, *[True] * (len(tokens) - 1)]), width, fill)
    yield Document([fill], [False])


def _pieces(document: Document, width: int) -> Iterator[tuple[list[int], list[bool]]]:
    tokens = list(document.tokens)
    targets = [True] * len(tokens) if document.targets is None else list(document.targets)
    for start in range(0, len(tokens), width):
        piece = targets[start : start + width]
        yield tokens[start : start + width], [False, *piece[1:]]


def _filled(row: tuple[list[int], list[bool]], width: int, fill: int) -> Document:
    left = width - len(row[0])
    return Document([*row[0], *[fill] * left], [*row[1], *[False] * left])
