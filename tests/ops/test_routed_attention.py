"""Attention to chosen pages in C++: what is chosen, against loops, and the same bits however it is
called."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.ops.attention.clusters import guess_scores, summarize
from deepseek.ops.routing import BLOCK, Routing
from tests.ops.native import BEST, ISAS, NEEDS_KERNELS, PAGE, Native
from tests.ops.test_paged_attention import BOUNDS, MEAN_BOUNDS, attend, draw, program

pytestmark = NEEDS_KERNELS

Heads = tuple[int, int, int]


def route(
    budget: int | list[int],
    *,
    refresh: int = 4,
    first: int = 1,
    recent: int = 1,
    threshold: float = 0.0,
    means: bool = True,
    summaries: bool = False,
) -> dict[str, Any]:
    return {
        "refresh": refresh,
        "first_pages": first,
        "recent_pages": recent,
        "budget": [budget] if isinstance(budget, int) else budget,
        "least_share": math.log(threshold) if threshold else -math.inf,
        "has_means": means,
        "has_summaries": summaries,
    }


def routed(
    isa: str, heads: Heads, table: np.ndarray, asked: dict[str, Any], threads: int = 2
) -> Native:
    """Return routed attention whose query, key and value of token i are row i of `table`."""
    num_heads, kv_heads, dim = heads
    width = num_heads * dim
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "attend", "input": 0, "output": 1, "layer": 0, "is_routed": 1},
        {"op": "linear", "input": 1, "output": -1, "weights": [1], "selected": 1},
    ]
    widths = [(num_heads + 2 * kv_heads) * dim, width]
    native = Native(
        isa,
        widths,
        instructions,
        vocab=max(len(table), width),
        heads=heads,
        threads=threads,
        route=asked,
    )
    native.weight(table)
    native.weight(np.eye(width, dtype=np.float32))
    native.program.start()
    native.width = width
    return native


def reference(
    heads: Heads, table: np.ndarray, asked: dict[str, Any], kind: str = "float32"
) -> np.ndarray:
    """Return the attention of each token over the pages that its group chose and the means of those
    that it did not, float64."""
    num_heads, kv_heads, dim = heads
    group = num_heads // kv_heads
    rows = table.astype(np.float64).reshape(len(table), -1, dim)
    out = np.zeros((len(table), num_heads, dim))
    for kv_head in range(kv_heads):
        keys, values = rows[:, num_heads + kv_head], rows[:, num_heads + kv_heads + kv_head]
        full = len(table) // PAGE
        means = [x[: full * PAGE].reshape(full, PAGE, dim).mean(1) for x in (keys, values)]
        slow = scored_channels(dim) if kind != "int8" else np.arange(dim)
        blocks = [keys[page * PAGE :][:PAGE, slow] for page in range(full)]
        summaries = [clusters(block) for block in blocks] if asked["has_summaries"] else []
        for place in range(len(table)):
            own = slice(kv_head * group, (kv_head + 1) * group)
            anchor = place - place % asked["refresh"]
            asking = rows[anchor, own][:, slow] @ keys[: anchor + 1, slow].T
            guesses = None
            if asked["has_summaries"]:
                query = rows[anchor, own][:, slow]
                reach = 0.5 * np.linalg.norm(query, axis=-1, keepdims=True)
                each = [(query @ means.T + reach * radii).max(-1) for means, radii in summaries]
                guesses = np.stack(each, 1) * dim**-0.5
            pages = chosen(asking * dim**-0.5, asked, guesses)
            seen = np.isin(np.arange(place + 1) // PAGE, pages)
            scores = rows[place, own] @ keys[: place + 1][seen].T * dim**-0.5
            shown = values[: place + 1][seen]
            others = [page for page in range(place // PAGE) if page not in pages]
            if asked["has_means"] and others:
                unseen = rows[place, own] @ means[0][others].T * dim**-0.5 + np.log(PAGE)
                scores = np.concatenate([scores, unseen], 1)
                shown = np.concatenate([shown, means[1][others]])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[place, own] = weights @ shown
    return out.reshape(len(table), -1)


def scored_channels(dim: int) -> np.ndarray:
    """Return the channels that pages are chosen by: the slow half, where heads are in its order."""
    quarter = dim // 4
    slow = np.r_[quarter : 2 * quarter, 3 * quarter : dim]
    return np.arange(dim) if dim % 64 else slow


def clusters(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of sixteen clusters of a page's keys, and their radii."""
    away = np.square(keys - keys.mean(0)).sum(1)
    means: list[np.ndarray] = []
    for _ in range(16):
        means.append(keys[away.argmax()])
        fresh = np.square(keys - means[-1]).sum(1)
        away = fresh if len(means) == 1 else np.minimum(away, fresh)
    found, nearest = np.stack(means), np.zeros(0, dtype=np.int64)
    for _ in range(2):
        nearest = np.square(keys[:, None] - found).sum(-1).argmin(1)
        found = np.stack(
            [keys[nearest == i].mean(0) if (nearest == i).any() else found[i] for i in range(16)]
        )
    off = np.square(keys - found[nearest]).sum(1)
    radii = [math.sqrt(off[nearest == i].mean()) if (nearest == i).any() else 0 for i in range(16)]
    return found, np.array(radii)


def chosen(
    scores: np.ndarray, asked: dict[str, Any], guesses: np.ndarray | None = None
) -> list[int]:
    """Return the pages that scores [heads, slots] choose, of those that guesses [heads, full pages]
    put first."""
    pages = -(-scores.shape[1] // PAGE)
    budget = asked["budget"][min(pages, len(asked["budget"])) - 1]
    first = min(asked["first_pages"], pages)
    recent = max(first, pages - asked["recent_pages"])
    best = np.stack([scores[:, p * PAGE : (p + 1) * PAGE].max(1) for p in range(pages)], 1)
    if guesses is not None:
        guessed = best.copy()
        older = max(0, pages - asked["recent_pages"])
        guessed[:, :older] = guesses[:, :older]
        others = {**asked, "least_share": -math.inf, "has_summaries": False}
        slots = np.repeat(guessed, PAGE, 1)
        left_out = np.setdiff1d(np.arange(pages), chosen(slots, others))
        best[:, left_out] = -np.inf
    best = best - np.log(np.exp(best).sum(1, keepdims=True))
    between = best.max(0)[first:recent]
    wanted = max(0, min(budget - first - (pages - recent), recent - first))
    order = np.argsort(-between, kind="stable")[:wanted]
    if wanted < recent - first:
        order = order[between[order] > asked["least_share"]]
    return [*range(first), *(order + first).tolist(), *range(recent, pages)]


HEADS = st.sampled_from([(1, 1, 16), (4, 2, 32), (9, 3, 64), (8, 2, 24), (16, 1, 16)])


ROUTES = st.builds(
    lambda first, recent, spare, **rest: route(
        first + recent + spare, first=first, recent=recent, **rest
    ),
    first=st.integers(0, 2),
    recent=st.integers(1, 2),
    spare=st.integers(0, 3),
    refresh=st.sampled_from([1, 4, 16, 64]),
    threshold=st.sampled_from([0.0, 0.05, 0.3]),
    means=st.booleans(),
    summaries=st.booleans(),
)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12, deadline=None)
@given(
    heads=HEADS,
    count=st.sampled_from([130, 257, 449, 590]),
    asked=ROUTES,
    seed=st.integers(0, 2**16),
)
def test_it_is_one_softmax_over_the_pages_that_the_group_chose(
    isa: str, heads: Heads, count: int, asked: dict[str, Any], seed: int
) -> None:
    table = draw(heads, count, seed)
    found = attend(routed(isa, heads, table, asked), "float32", count, [600])
    np.testing.assert_allclose(found, reference(heads, table, asked), rtol=0, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [(4, 2, 32), (6, 2, 64), (2, 1, 24)])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_blocks_are_judged_by_their_summaries_first(
    isa: str, heads: Heads, threshold: float
) -> None:
    table = draw(heads, 700, 5)
    table.reshape(700, -1, heads[2])[:, : heads[0]] *= 2
    asked = route([3, 3, 3, 4], refresh=8, threshold=threshold, summaries=True)
    found = attend(routed(isa, heads, table, asked), "float32", 700, [64, 300])
    np.testing.assert_allclose(found, reference(heads, table, asked), rtol=0, atol=2e-5)
    by_keys = reference(heads, table, {**asked, "has_summaries": False})
    assert np.abs(found - by_keys).max() > 1e-3  # they leave something out


def test_the_reference_of_summaries_is_these_loops() -> None:
    draws = np.random.default_rng(0)
    keys, queries = draws.normal(size=(3, PAGE, 16)), draws.normal(size=(5, 16))
    means, radii = summarize(torch.from_numpy(keys))
    each = [clusters(block) for block in keys]
    np.testing.assert_allclose(means, np.stack([found for found, _ in each]), atol=1e-12)
    np.testing.assert_allclose(radii, np.stack([found for _, found in each]), atol=1e-12)
    reach = 0.5 * np.linalg.norm(queries, axis=-1, keepdims=True)
    expected = [(queries @ found.T + reach * radius).max(-1) for found, radius in each]
    guesses = guess_scores(torch.from_numpy(queries), means, radii)
    np.testing.assert_allclose(guesses, np.stack(expected, 1), atol=1e-12)


@functools.cache
def expected_choice(kind: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a table of queries that ask sharply, and their attention."""
    heads = (4, 2, dim)
    table = draw(heads, 449, 9)
    table.reshape(449, 8, dim)[:, :4] *= 4
    return table, reference(heads, table, route(3), kind)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("dim", [64, 128])
def test_small_types_choose_as_float32_where_it_is_not_close(isa: str, kind: str, dim: int) -> None:
    table, expected = expected_choice(kind, dim)
    found = attend(routed(isa, (4, 2, dim), table, route(3)), kind, 449, [449])
    off = np.abs(found - expected).reshape(449, 2, -1).max(-1)
    assert np.mean(off > 0.15) < 0.03  # by other channels a third


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize(("refresh", "summaries"), [(1, False), (8, False), (1, True)])
def test_steps_chunks_and_threads_give_the_same_bits(
    isa: str, kind: str, refresh: int, summaries: bool
) -> None:
    heads = (6, 2, 64)
    table = draw(heads, 450, 0)
    asked = route([3, 3, 3, 3, 4], refresh=refresh, threshold=0.2, summaries=summaries)
    whole = attend(routed(isa, heads, table, asked, threads=3), kind, 450, [512])
    one = routed(isa, heads, table, asked, threads=1)
    for splits in ([1], [7, 64, 1, 130]):
        assert np.array_equal(attend(one, kind, 450, splits), whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(BOUNDS))
def test_a_budget_of_all_pages_is_dense(isa: str, kind: str) -> None:
    """Short texts by the very same kernel; behind the least budget by another order of sums."""
    heads = (9, 3, 64)
    table = draw(heads, 500, 1)
    dense = attend(program(isa, heads, table, 0), kind, 500, [500])
    few = attend(routed(isa, heads, table, route(8)), kind, 500, [500])
    assert np.array_equal(few, dense)
    off = np.abs(attend(routed(isa, heads, table, route([2, 8])), kind, 500, [500]) - dense)
    assert off.max() <= BOUNDS[kind]
    assert np.sqrt(np.mean(off**2)) <= MEAN_BOUNDS[kind]


@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize("summaries", [False, True])
def test_a_row_does_not_depend_on_its_companions(kind: str, summaries: bool) -> None:
    heads = (6, 2, 64)
    table = draw(heads, 400, 2)
    native = routed(BEST, heads, table, route(3, summaries=summaries))
    alone = attend(native, kind, 400, [400])
    pages, order = native.pages(kind, 16), np.arange(14).reshape(2, 7)
    for start in range(0, 400, 150):  # the other row is a short one that begins anew
        places = list(range(start, min(start + 150, 400)))
        other = list(range(37))
        rows = [0] * len(places) + [1] * len(other)
        found = native.run(places + other, places + other, rows, order, pages)[:, : native.width]
        assert np.array_equal(found[: len(places)], alone[places])
        assert np.array_equal(found[len(places) :], alone[other])
    places = [399, 36]
    found = native.run(places, places, [0, 1], order, pages)[:, : native.width]
    assert np.array_equal(found, alone[places])


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_what_a_page_held_before_is_not_chosen(kind: str) -> None:
    heads = (2, 1, 16)
    table = draw(heads, 300, 3)
    native = routed(BEST, heads, table, route(2, refresh=8))
    pages = native.pages(kind, 8)
    attend(native, kind, 300, [300], pages)
    again = attend(native, kind, 260, [13], pages)
    assert np.array_equal(again, attend(native, kind, 260, [260]))


@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize("summaries", [False, True])
def test_a_copied_page_goes_on_with_its_choice(kind: str, summaries: bool) -> None:
    heads = (2, 1, 16)
    table = draw(heads, 300, 3)
    native = routed(BEST, heads, table, route(3, refresh=16, summaries=summaries))
    pages = native.pages(kind, 9)
    places = list(range(297))
    native.run(places, places, [0] * 297, np.array([[0, 1, 2, 3, 4]]), pages)
    for copy, original in ((5, 1), (6, 4), (7, 2), (8, 3)):  # those that are not seen too
        pages.copy(copy, original)
    expected = native.run([297], [297], [0], np.array([[0, 1, 2, 3, 4]]), pages)[:, :32]
    found = native.run([297], [297], [0], np.array([[0, 5, 7, 8, 6]]), pages)[:, :32]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_a_needle_in_a_page_of_the_middle_is_found(isa: str, kind: str, dim: int) -> None:
    heads, count, needle = (2, 1, dim), 560, 200
    table = draw(heads, count, 5)
    rows = table.reshape(count, 4, dim)
    rows[-1, 1] = 10 * rows[needle, 2]  # one head asks for a key of long ago
    native = routed(isa, heads, table, route(3, refresh=1))
    found = attend(native, kind, count, [count])[-1].reshape(2, dim)
    np.testing.assert_allclose(found[1], rows[needle, 3], rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "asked",
    [
        route(3, refresh=3),
        route(3, refresh=0),
        route(3, recent=0),
        route(1, first=1),
        route([]),
    ],
)
def test_a_route_that_cannot_be_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a route"):
        routed(BEST, (1, 1, 16), draw((1, 1, 16), 10, 0), asked)


def test_pages_of_another_program_are_refused() -> None:
    heads = (2, 1, 16)
    table = draw(heads, 70, 0)
    native = routed(BEST, heads, table, route(3))
    for other in (
        program(BEST, heads, table, 0),
        routed(BEST, heads, table, route(3, means=False)),
    ):
        with pytest.raises(ValueError, match="pages made for a program that is not routed"):
            native.run([0], [0], [0], np.array([[0, 1]]), other.pages("float32", 2))


def test_the_budget_grows_to_its_bounds_and_then_with_the_logarithm() -> None:
    routing = Routing()
    seen = routing.budget(2048)
    assert seen[:32] == [16] * 32 and seen[63] == 32 and seen[128] == seen[256] == 64
    assert all(before <= after for before, after in itertools.pairwise(seen))
    assert seen[1023] == int(4096 * 16 / 14) // BLOCK


@pytest.mark.parametrize(
    "changes",
    [
        {"refresh": 3},
        {"recent": 0},
        {"least": 256},
        {"least": 8192},
        {"threshold": 1.0},
        {"share": 0.0},
        {"most_from": 1024},
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Routing must be"):
        Routing(**changes)
