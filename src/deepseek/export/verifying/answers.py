"""Asks a case of a reader, and the same of the source, row by row and without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from deepseek.errors import VerifyError, describe
from deepseek.export.formats import Floats, Ids, Reader
from deepseek.export.verifying.cases import Case

MAX_PASS_TOKENS = 512
"""Tokens of one pass of the source over rows of equal length; a longer row goes alone."""

Row = tuple[int, ...]
Expected = dict[Row, Floats]
"""What the source answers for a row alone, [tokens, width]; [1, labels] of a classifier."""


def ask(reader: Reader, case: Case) -> list[Floats]:
    """Return what a reader answers for each row of a case, [tokens, width], padding left out; of a
    classifier [1, labels].

    Raises:
        VerifyError: answers of another shape.
    """
    ids, mask = case.arrays()
    found = _in_steps(reader, case, ids) if case.steps else reader.forward(ids, mask)
    per_row = reader.kind == "classifier"
    shape = ids.shape[:1] if per_row else ids.shape
    if found.ndim != len(shape) + 1 or found.shape[:-1] != shape:
        must = f"of the shape {[*shape, 'width']}"
        raise VerifyError(describe("answer", reader.name, must, list(found.shape)))
    if per_row:
        return [found[row : row + 1] for row in range(len(case.rows))]
    starts = [case.lead(row) for row in range(len(case.rows))]
    return [found[row, start : start + len(case.rows[row])] for row, start in enumerate(starts)]


def _in_steps(reader: Reader, case: Case, ids: Ids) -> Floats:
    parts, state, start = [], None, 0
    for length in case.steps:
        piece = ids[:, start : start + length]
        if case.forks:
            other = ids[:, ::-1][:, start : start + length]
            reader.step(other.copy(), state)
        part, state = reader.step(piece.copy(), state)
        parts.append(part)
        start += length
    return np.concatenate(parts, axis=1)


def expect(source: Reader, cases: Iterable[Case]) -> Expected:
    """Return what the source answers for every row of the cases.

    Rows of one length share a pass, without padding and in one piece, whatever the cases do with
    them.
    """
    rows = dict.fromkeys(row for case in cases for row in case.rows)
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    found: Expected = {}
    for length, alike in sorted(by_length.items()):
        size = max(1, MAX_PASS_TOKENS // length)
        for start in range(0, len(alike), size):
            found |= _one_pass(source, alike[start : start + size])
    return found


def _one_pass(source: Reader, rows: Sequence[Row]) -> Expected:
    ids = np.array(rows, np.int64)
    answers = source.forward(ids, np.ones_like(ids))
    if source.kind == "classifier":
        answers = answers[:, None]
    return dict(zip(rows, answers, strict=True))
