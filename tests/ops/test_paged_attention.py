"""Attention over pages in C++ against a loop over queries: every storage, odd heads, windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.native import BEST, ISAS, NEEDS_KERNELS, PAGE, Native

pytestmark = NEEDS_KERNELS

BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2, "int8": 9e-2}
"""Of the worst value among hundreds of thousands, drawn from a normal distribution. Scores too are
rounded to the storage; in int8 the weights as well, to 1/255 of the largest of a span."""
MEAN_BOUNDS = {"float32": 5e-7, "bfloat16": 3e-3, "int8": 1e-2}
"""Of the root of the mean square: what a wrong scale or slot cannot stay under."""


def program(
    isa: str, heads: tuple[int, int, int], table: np.ndarray, window: int, threads: int = 2
) -> Native:
    """Return attention whose query, key and value of token i are row i of `table`."""
    num_heads, kv_heads, dim = heads
    width = num_heads * dim
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "attend", "input": 0, "output": 1, "layer": 0, "window": window},
        {"op": "linear", "input": 1, "output": -1, "weights": [1], "selected": 1},
    ]
    widths = [(num_heads + 2 * kv_heads) * dim, width]
    vocab = max(len(table), width)
    native = Native(isa, widths, instructions, vocab=vocab, heads=heads, threads=threads)
    native.weight(table)
    native.weight(np.eye(width, dtype=np.float32))
    native.program.start()
    native.width = width
    return native


def reference(heads: tuple[int, int, int], table: np.ndarray, window: int) -> np.ndarray:
    """Return the attention of each token over the tokens up to it, float64 [T, heads * dim]."""
    num_heads, kv_heads, dim = heads
    count = len(table)
    rows = table.astype(np.float64).reshape(count, -1, dim)
    out = np.zeros((count, num_heads, dim))
    for head in range(num_heads):
        keys = rows[:, num_heads + head // (num_heads // kv_heads)]
        values = rows[:, num_heads + kv_heads + head // (num_heads // kv_heads)]
        for place in range(count):
            first = max(0, place + 1 - window) if window else 0
            scores = keys[first : place + 1] @ rows[place, head] * dim**-0.5
            weights = np.exp(scores - scores.max())
            out[place, head] = weights @ values[first : place + 1] / weights.sum()
    return out.reshape(count, -1)


def attend(
    native: Native, kind: str, count: int, splits: list[int], pages: object | None = None
) -> np.ndarray:
    """Return the attention of `count` tokens, `splits` of them at a time, on scrambled pages."""
    per_row = -(-count // PAGE)
    order = np.random.default_rng(1).permutation(per_row + 3)[:per_row]
    pages = native.pages(kind, per_row + 3) if pages is None else pages
    found, done, number = [], 0, 0
    while done < count:
        size = min(splits[number % len(splits)], count - done)
        places = list(range(done, done + size))
        found.append(native.run(places, places, [0] * size, order[None], pages))
        done, number = done + size, number + 1
    width = native.width
    return np.concatenate(found)[:, :width]


def draw(heads: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    num_heads, kv_heads, dim = heads
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, (num_heads + 2 * kv_heads) * dim)).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(BOUNDS))
@settings(max_examples=10, deadline=None)
@example(kv_heads=2, group=3, dim=2, count=1, window=0, seed=60914)  # four values, all large
@given(
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5, 7]),
    dim=st.sampled_from([2, 8, 16, 24, 64, 80, 128]),
    count=st.sampled_from([1, 2, 63, 64, 65, 130, 257, 300]),
    window=st.sampled_from([0, 1, 5, 64, 100, 1000]),
    seed=st.integers(0, 2**16),
)
def test_it_is_one_softmax_over_what_a_query_sees(
    isa: str, kind: str, kv_heads: int, group: int, dim: int, count: int, window: int, seed: int
) -> None:
    heads = (kv_heads * group, kv_heads, dim)
    table = draw(heads, count, seed)
    native = program(isa, heads, table, window)
    off = np.abs(attend(native, kind, count, [512]) - reference(heads, table, window))
    assert off.max() <= BOUNDS[kind]
    if kv_heads * dim * count >= 64:  # the mean of a few values is as wide as their largest
        assert np.sqrt(np.mean(off**2)) <= MEAN_BOUNDS[kind]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize("window", [0, 70])
def test_steps_chunks_and_threads_give_the_same_bits(isa: str, kind: str, window: int) -> None:
    heads = (6, 2, 64)
    table = draw(heads, 300, 0)
    whole = attend(program(isa, heads, table, window, threads=3), kind, 300, [512])
    one = program(isa, heads, table, window, threads=1)
    for splits in ([1], [7, 64, 1, 130]):
        assert np.array_equal(attend(one, kind, 300, splits), whole)


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_what_an_earlier_row_left_in_a_page_is_not_seen(kind: str) -> None:
    heads = (2, 1, 16)
    table = draw(heads, 200, 3)
    native = program(BEST, heads, table, 0)
    pages = native.pages(kind, 7)
    attend(native, kind, 200, [200], pages)
    again = attend(native, kind, 70, [33], pages)
    assert np.array_equal(again, attend(native, kind, 70, [70]))


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_a_copied_page_holds_the_same(kind: str) -> None:
    heads = (2, 1, 16)
    table = draw(heads, 64, 3)
    native = program(BEST, heads, table, 0)
    pages = native.pages(kind, 2)
    places = list(range(63))
    native.run(places, places, [0] * 63, np.array([[0]]), pages)
    pages.copy(1, 0)
    expected = native.run([63], [63], [0], np.array([[0]]), pages)[:, :32]
    found = native.run([63], [63], [0], np.array([[1]]), pages)[:, :32]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_scores_stay_finite(isa: str) -> None:
    heads = (1, 1, 16)
    table = draw(heads, 100, 4) * 60
    found = attend(program(isa, heads, table, 0), "float32", 100, [100])[:, :16]
    np.testing.assert_allclose(found, reference(heads, table, 0), rtol=0, atol=2e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_queries_and_keys_are_rotated_by_their_positions(isa: str) -> None:
    """Scores depend on the distance of two tokens only."""
    dim, count = 32, 90
    rng = np.random.default_rng(0)
    one = rng.standard_normal(3 * dim).astype(np.float32)
    table = np.tile(one, (count, 1))
    table[:, 2 * dim :] = rng.standard_normal((count, dim))
    angles = (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "attend", "input": 0, "output": 1, "layer": 0},
        {"op": "linear", "input": 1, "output": -1, "weights": [1], "selected": 1},
    ]
    native = Native(
        isa, [3 * dim, dim], instructions, vocab=count, heads=(1, 1, dim), angles=angles.tolist()
    )
    native.weight(table)
    native.weight(np.eye(dim, dtype=np.float32))
    native.program.start()
    native.width = dim
    found = attend(native, "float32", count, [count])
    turned = np.zeros((count, 2, dim))
    for part in range(2):
        first, second = np.split(one[part * dim : (part + 1) * dim].astype(np.float64), 2)
        angle = np.arange(count)[:, None] * angles.astype(np.float64)
        turned[:, part, : dim // 2] = first * np.cos(angle) - second * np.sin(angle)
        turned[:, part, dim // 2 :] = second * np.cos(angle) + first * np.sin(angle)
    rotated = np.concatenate((turned[:, 0], turned[:, 1], table[:, 2 * dim :]), axis=1)
    np.testing.assert_allclose(found, reference((1, 1, dim), rotated, 0), rtol=0, atol=1e-4)
