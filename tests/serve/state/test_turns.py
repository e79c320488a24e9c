"""Tenants take turns, and a refused one waits alone."""

from __future__ import annotations

import collections

from hypothesis import given
from hypothesis import strategies as st

from deepseek.serve.state.turns import Turns


@given(st.integers(2, 5), st.integers(10, 60))
def test_turns_are_even(tenants: int, lines: int) -> None:
    turns = Turns()
    names = [f"{number}" for number in range(tenants)]
    served: collections.Counter[str] = collections.Counter()
    for _ in range(lines):
        name = turns.order(names, 0.0)[0]
        turns.begin(name)
        served[name] += 1
        turns.end(name)
    assert max(served.values()) - min(served.values()) <= 1


def test_who_runs_least_is_first() -> None:
    turns = Turns()
    for name in ("a", "a", "b"):
        turns.begin(name)
    assert turns.order(["a", "b", "c"], 0.0) == ["c", "b", "a"]
    turns.end("a")
    turns.end("a")
    assert turns.order(["a", "b", "c"], 0.0) == ["c", "a", "b"]


def test_refusals_double_the_wait_and_success_ends_it() -> None:
    turns = Turns(first_wait_s=1, longest_wait_s=5)
    for now, wait_s in ((0, 1), (10, 2), (20, 4), (30, 5), (40, 5)):
        turns.refuse("a", now)
        assert turns.order(["a", "b"], now + wait_s - 0.01) == ["b"]
        assert set(turns.order(["a", "b"], now + wait_s)) == {"a", "b"}
    turns.accept("a")
    assert turns.order(["a"], 40) == ["a"]
    turns.refuse("a", 100)
    assert turns.order(["a"], 101) == ["a"]


def test_endless_refusals_do_not_overflow() -> None:
    turns = Turns(longest_wait_s=60)
    for _ in range(2000):
        turns.refuse("a", 0)
    assert turns.order(["a"], 60) == ["a"]


def test_tenants_without_batches_are_forgotten() -> None:
    turns = Turns()
    for number in range(100):
        turns.begin(f"{number}")
        turns.refuse(f"{number}", 0)
    turns.end("1")
    turns.keep_only(["0"])
    turns.keep_only([])
    assert turns.order(["1", "2"], 0) == ["1"], "2 still runs and still waits"
