"""Makes a case that fails as small as it can be while it still fails.

Delta debugging on the fields of a case: simpler forms are tried in a fixed order, and the first
that fails takes the case's place, until none does. Nothing is random, so that a case always shrinks
to the same one.

Source: Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input" (IEEE TSE 28,
2002), section 3: the halving of chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from deepseek.export.verifying.cases import Case
from deepseek.export.verifying.compare import Departure

Fails = Callable[[Case], Departure | None]
MOST_TOKENS = 12_000
"""Tokens of all the cases that are tried, so that long ones end in minutes."""
MOST_TRIED = 300


def shrink(
    case: Case, departure: Departure, fails: Fails, *, plain: int, most_tokens: int = MOST_TOKENS
) -> tuple[Case, Departure]:
    """Return the smallest form of a case found that still fails, and how it fails.

    Args:
        case: one that fails.
        departure: how.
        fails: asks a case anew.
        plain: an id of no meaning, that others are replaced by where it makes no difference.
        most_tokens: asked in all at most; what was found until then is returned.
    """
    left = most_tokens
    tried: set[Case] = {dataclasses.replace(case, id="")}
    smaller = True
    while smaller:
        smaller = False
        for candidate in _simpler(case, departure, plain):
            key = dataclasses.replace(candidate, id="")
            if key in tried:
                continue
            cost = candidate.num_tokens + 20 * max(1, len(candidate.steps))
            if cost > left or len(tried) > MOST_TRIED:
                continue
            left -= cost
            tried.add(key)
            found = fails(candidate)
            if found is not None:
                case, departure, smaller = candidate, found, True
                break
    return case, departure


def _simpler(case: Case, departure: Departure, plain: int) -> Iterator[Case]:
    """Yield simpler forms of a case, those that take away most first."""
    yield from _up_to_departure(case, departure)
    yield from _fewer_rows(case, departure)
    yield from _fewer_steps(case)
    yield from _less_padding(case, plain)
    yield from _plain_rows(case, plain)
    yield from _fewer_tokens(case)
    yield from _plain_tokens(case, plain)


def _up_to_departure(case: Case, departure: Departure) -> Iterator[Case]:
    """Yield the case cut behind the first position that departs: what comes later matters to no
    causal model."""
    if departure.row is None or departure.place is None:
        return
    stop = departure.place + 1
    if not case.steps and len(case.rows) > 1:
        yield dataclasses.replace(case, rows=(case.rows[departure.row][:stop],), extra=0)
    if stop < max(map(len, case.rows)):
        yield _kept(case, [range(min(stop, len(row))) for row in case.rows])


def _fewer_rows(case: Case, departure: Departure) -> Iterator[Case]:
    if len(case.rows) == 1:
        return
    order = sorted(range(len(case.rows)), key=lambda row: row != departure.row)
    for row in order:
        yield dataclasses.replace(case, rows=(case.rows[row],))
    for left_out in reversed(order):
        kept = tuple(row for number, row in enumerate(case.rows) if number != left_out)
        yield dataclasses.replace(case, rows=kept)


def _fewer_steps(case: Case) -> Iterator[Case]:
    if not case.steps:
        return
    yield dataclasses.replace(case, steps=(), forks=False)
    if case.forks:
        yield dataclasses.replace(case, forks=False)
    for cut in range(1, len(case.steps)):
        first, second = case.steps[cut - 1 : cut + 1]
        merged = (*case.steps[: cut - 1], first + second, *case.steps[cut + 1 :])
        yield dataclasses.replace(case, steps=merged)


def _less_padding(case: Case, plain: int) -> Iterator[Case]:
    for extra in dict.fromkeys((0, case.extra // 2, case.extra - 1)):
        if 0 <= extra < case.extra:
            yield dataclasses.replace(case, extra=extra)
    if case.width > min(map(len, case.rows)):
        if case.side == "left":
            yield dataclasses.replace(case, side="right")
        if case.filler != plain:
            yield dataclasses.replace(case, filler=plain)
    elif (case.side, case.filler) != ("right", 0):
        yield dataclasses.replace(case, side="right", filler=0)


def _fewer_tokens(case: Case) -> Iterator[Case]:
    """Yield the case without chunks of its tokens, halves first; rows in pieces stay alike, of
    others one row at a time is cut, and where they are alike all together."""
    alike = len({len(row) for row in case.rows}) == 1
    groups = [list(range(len(case.rows)))] if alike else []
    if not case.steps and len(case.rows) > 1:
        groups += [[row] for row in range(len(case.rows))]
    for group in groups:
        length = min(len(case.rows[row]) for row in group)
        size = length // 2
        while size:
            for start in range(0, length, size):
                stop = min(start + size, length)
                if stop - start < length:
                    yield _kept(
                        case,
                        [
                            [at for at in range(len(row)) if not start <= at < stop]
                            if number in group
                            else range(len(row))
                            for number, row in enumerate(case.rows)
                        ],
                    )
            size //= 2


def _kept(case: Case, places: list[range] | list[range | list[int]]) -> Case:
    """Return the case with only these places of each row; pieces lose what they lose."""
    rows = tuple(tuple(row[at] for at in kept) for row, kept in zip(case.rows, places, strict=True))
    steps, start = [], 0
    for length in case.steps:
        steps.append(sum(start <= at < start + length for at in places[0]))
        start += length
    return dataclasses.replace(case, rows=rows, steps=tuple(size for size in steps if size))


def _plain_rows(case: Case, plain: int) -> Iterator[Case]:
    """Yield the case with an id of no meaning everywhere in a row."""
    for number, row in enumerate(case.rows):
        rows = (*case.rows[:number], (plain,) * len(row), *case.rows[number + 1 :])
        yield dataclasses.replace(case, rows=rows)


def _plain_tokens(case: Case, plain: int) -> Iterator[Case]:
    """Yield the case with chunks of its tokens replaced by an id of no meaning, halves first."""
    for number, row in enumerate(case.rows):
        size = max(1, len(row) // 2)
        while size:
            for start in range(0, len(row), size):
                chunk = row[start : start + size]
                if all(token == plain for token in chunk):
                    continue
                changed = (*row[:start], *(plain,) * len(chunk), *row[start + size :])
                rows = (*case.rows[:number], changed, *case.rows[number + 1 :])
                yield dataclasses.replace(case, rows=rows)
            size //= 2
