"""Rows of whole documents: nothing lost, nothing cut that fits, nothing learned from nothing."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from deepseek.data import Document, Windows, packed, write_corpus

FILL = 999
DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents(sizes: list[int]) -> list[Document]:
    """Return documents whose tokens say whose they are and where they stand in it."""
    return [
        Document([100 * (number % 9) + place for place in range(size)])
        for number, size in enumerate(sizes)
    ]


@given(DOCUMENTS, st.integers(3, 30))
def test_rows_hold_every_document_whole(sizes: list[int], length: int) -> None:
    *rows, end = packed(documents(sizes), length, FILL)
    assert (list(end.tokens), list(end.targets or ())) == ([FILL], [False])
    assert all(len(row.tokens) == len(row.targets or ()) == length - 1 for row in rows)
    found = sorted(token for row in rows for token in row.tokens if token != FILL)
    assert found == sorted(token for each in documents(sizes) for token in each.tokens)
    for row in rows:
        for place, token in enumerate(row.tokens):
            # a piece begins a document, or goes on behind its neighbour or a cut
            is_start = token % 100 % (length - 1) == 0
            assert token == FILL or is_start or row.tokens[place - 1] == token - 1
            assert bool((row.targets or ())[place]) == (token != FILL and not is_start)


@given(st.lists(st.integers(1, 15), min_size=20, max_size=200))
def test_little_is_filled(sizes: list[int]) -> None:
    *rows, _ = packed(documents(sizes), 65, FILL)
    filled = sum(token == FILL for row in rows for token in row.tokens)
    assert filled <= 64 + 16 * len(rows) // 2


def test_targets_stay_with_their_tokens() -> None:
    document = Document([1, 2, 3, 4], [False, True, False, True])
    row, _ = packed([document], 8, FILL)
    assert row.targets == [False, True, False, True, False, False, False]


def test_a_window_is_a_row(tmp_path: Path) -> None:
    rows = list(packed(documents([5, 9, 3, 7, 11, 2]), 13, FILL))
    corpus = write_corpus(
        tmp_path / "corpus", rows, name="x", vocab_size=1000, tokenizer_sha256="x"
    )
    windows = Windows([corpus], length=13)
    assert windows.num_windows == len(rows) - 1
    samples = windows.read(0, windows.num_windows)
    for tokens, targets in zip(samples.tokens, samples.targets, strict=True):
        row = next(row for row in rows if list(row.tokens) == tokens[:-1].tolist())
        assert np.array_equal(targets[:-1], row.targets)
        assert not targets[-1]
