"""Failing cases become as small as they can be, always the same way."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.export.verifying.cases import Case
from deepseek.export.verifying.compare import Departure
from deepseek.export.verifying.shrink import Fails, shrink

FAILS = Departure("fails")


def case(*rows: tuple[int, ...], **fields: object) -> Case:
    """Return a case of these rows."""
    return Case(id="a", kind="b", rows=rows, **fields)  # type: ignore[arg-type]


def failing(holds: object) -> Fails:
    """Return what fails where a condition of a case is met."""
    return lambda asked: FAILS if holds(asked) else None  # type: ignore[operator]


LONG = tuple(range(100, 400))


@pytest.mark.parametrize(
    ("start", "condition", "smallest"),
    [
        (case(LONG), lambda c: True, case((7,))),
        (case(LONG), lambda c: 217 in c.rows[0], case((217,))),
        (case(LONG), lambda c: {130, 391} <= {*c.rows[0]}, case((130, 391))),
        (case(LONG), lambda c: len(c.rows[0]) > 64, case((7,) * 65)),
        (case(LONG[:5], LONG), lambda c: len(c.rows) > 1, case((7,), (7,))),
        (case(LONG[:5], LONG[:9], (1,)), lambda c: 1 in c.rows[-1], case((1,))),
        (
            case(LONG[:20], steps=(10, 4, 4, 1, 1), forks=True),
            lambda c: len(c.steps) > 1,
            case((7, 7), steps=(1, 1)),
        ),
        (
            case(LONG[:20], steps=(10, 10), forks=True),
            lambda c: c.forks,
            case((7,), steps=(1,), forks=True),
        ),
        (
            case(LONG[:9], LONG[:3], side="left", extra=4, filler=5),
            lambda c: c.side == "left" and c.width > min(map(len, c.rows)),
            case((7,), side="left", extra=1, filler=7),
        ),
        (
            case(LONG[:9], side="left", extra=6, filler=5),
            lambda c: len(c.rows[0]) > 4,
            case((7,) * 5),
        ),
    ],
)
def test_the_smallest_is_found(start: Case, condition: object, smallest: Case) -> None:
    fails = failing(condition)
    found, departure = shrink(start, FAILS, fails, plain=7)
    assert dataclasses.replace(found, id="a") == smallest
    assert departure is FAILS
    assert shrink(start, FAILS, fails, plain=7)[0] == found


def test_what_comes_behind_the_departure_goes_at_once() -> None:
    asked: list[int] = []

    def fails(one: Case) -> Departure | None:
        asked.append(one.num_tokens)
        return Departure("late", 0, 1024) if one.num_tokens > 1024 else None

    start = case(tuple(range(2048)))
    found, _ = shrink(start, Departure("late", 0, 1024), fails, plain=7, most_tokens=20_000)
    assert asked[0] == 1025 == found.num_tokens
    assert sum(asked) <= 20_000


def test_no_more_is_asked_than_allowed() -> None:
    asked: list[int] = []

    def fails(one: Case) -> Departure | None:
        asked.append(one.num_tokens)
        return None

    start = case(tuple(range(300)))
    assert shrink(start, FAILS, fails, plain=7, most_tokens=1000) == (start, FAILS)
    assert sum(asked) <= 1000


@given(st.integers(0, 10**6))
def test_every_smaller_case_can_be_asked(seed: int) -> None:
    """Whatever fails, what is asked is a case: rows, pieces and padding fit together."""
    draw = random.Random(seed)
    rows = [tuple(draw.randrange(300) for _ in range(draw.randint(1, 12))) for _ in range(3)]
    pieces = draw.random() < 0.5
    rows = [row[: min(map(len, rows))] for row in rows] if pieces else rows
    length = len(rows[0])
    first = draw.randint(1, length)
    start = case(
        *rows[: draw.randint(1, 3)],
        side=draw.choice(("left", "right")),
        extra=0 if pieces else draw.randint(0, 3),
        steps=(first, length - first) if pieces and length > first else (),
        forks=pieces and length > first and draw.random() < 0.5,
    )

    def fails(one: Case) -> Departure | None:
        assert Case.from_dict(one.to_dict()) == one
        assert one.num_tokens <= start.num_tokens
        row = draw.randrange(len(one.rows))
        place = draw.randrange(len(one.rows[row]))
        return Departure("", row, place) if draw.random() < 0.4 else None

    found, _ = shrink(start, Departure("", 0, 0), fails, plain=7)
    assert found.num_tokens <= start.num_tokens
