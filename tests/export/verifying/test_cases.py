"""Cases: what a seed draws, that all of it can be asked, and that a case goes through a file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError, FormatError
from deepseek.export.verifying.cases import Case, Space
from deepseek.export.verifying.generator import BORDERS, SHARES, coverage, generate

SPACE = Space(
    vocab_size=330,
    max_tokens=2048,
    max_batch=8,
    pads_left=True,
    has_cache=True,
    boundaries=(0, 329, 1, 328, 2),
    outliers=(5, 17, 200),
    texts=((1, 2, 3), (4, 5, 6, 7)),
)

spaces = st.builds(
    Space,
    vocab_size=st.just(330),
    max_tokens=st.integers(1, 3000),
    max_batch=st.integers(1, 9),
    pads_left=st.booleans(),
    has_cache=st.booleans(),
    boundaries=st.lists(st.integers(0, 329), min_size=1, max_size=8).map(tuple),
    outliers=st.lists(st.integers(0, 329), min_size=1, max_size=8).map(tuple),
    texts=st.lists(st.lists(st.integers(0, 329), min_size=1).map(tuple), max_size=3).map(tuple),
)


@settings(deadline=None)
@given(spaces, st.integers(1, 260), st.integers(0, 2**32))
def test_every_case_can_be_asked(space: Space, num_cases: int, seed: int) -> None:
    cases = generate(space, num_cases, seed)
    assert len(cases) == num_cases
    assert len({case.id for case in cases}) == num_cases
    for case in cases:
        assert 1 <= len(case.rows) <= space.max_batch
        assert all(row and all(0 <= token < space.vocab_size for token in row) for row in case.rows)
        assert 0 <= case.filler < space.vocab_size
        assert case.width <= space.max_tokens
        assert case.side == "right" or space.pads_left
        assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
        ids, mask = case.arrays()
        assert ids.shape == mask.shape == (len(case.rows), case.width)
        for number, row in enumerate(case.rows):
            start = case.lead(number)
            assert tuple(ids[number, start : start + len(row)]) == row
            assert mask[number].sum() == mask[number, start : start + len(row)].sum() == len(row)
        if case.steps:
            assert space.has_cache
            assert {len(row) for row in case.rows} == {sum(case.steps)} == {case.width}


def test_a_seed_draws_the_same_cases_and_another_one_others() -> None:
    assert generate(SPACE, 200, 3) == generate(SPACE, 200, 3)
    assert generate(SPACE, 200, 3) != generate(SPACE, 200, 4)


def test_a_thousand_cases_ask_for_everything() -> None:
    cases = generate(SPACE, 1000, 0)
    by_kind = {kind: [case for case in cases if case.kind == kind] for kind in (*SHARES, "long")}
    assert all(len(found) >= 20 for found in by_kind.values())
    assert len(by_kind["long"]) == 20
    lengths = {len(row) for case in by_kind["lengths"] for row in case.rows}
    assert lengths >= {*range(1, 49), *BORDERS}
    assert {2048, 2047, 1025, 1024, 1023} <= {len(case.rows[0]) for case in by_kind["long"]}
    assert sum(case.num_tokens > 1024 for case in cases) >= 8
    assert {case.side for case in by_kind["padding"]} == {"left", "right"}
    assert {len(case.rows) for case in by_kind["batch"]} == {2, 3, 4, 5, 6}
    ends = {case.steps[0] for case in by_kind["cache"]}
    assert {63, 64, 127, 128} & ends
    assert any(case.forks for case in by_kind["cache"])
    asked = {token for case in by_kind["boundary"] for row in case.rows for token in row}
    assert asked >= {*SPACE.boundaries}
    assert coverage(cases, SPACE.vocab_size) == 1.0


def test_ids_are_dealt_before_they_come_twice() -> None:
    wide = dataclasses.replace(SPACE, vocab_size=49152)
    cases = generate(wide, 1000, 0)
    tokens = sum(case.num_tokens for case in cases)
    assert 20_000 < tokens < 60_000
    assert coverage(cases, 49152) > 0.4


def test_no_cases_are_refused() -> None:
    with pytest.raises(ConfigError, match="cases of verify must be at least 1"):
        generate(SPACE, 0)


GOOD: dict[str, Any] = {"id": "a", "kind": "b", "rows": [[1, 2, 3]]}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": [[]]},
        {"rows": [[1, "2"]]},
        {"rows": [[1, -2]]},
        {"rows": 3},
        {"id": "../a"},
        {"id": 3},
        {"side": "top"},
        {"extra": -1},
        {"steps": [1, 1]},
        {"steps": [3, 0]},
        {"steps": [1, 2], "extra": 1},
        {"more": 1},
    ],
)
def test_what_is_no_case_is_refused(change: dict[str, Any]) -> None:
    assert Case.from_dict(GOOD).rows == ((1, 2, 3),)
    with pytest.raises(FormatError, match="case of a case file"):
        Case.from_dict({**GOOD, **change})


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text())))
def test_garbage_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Case.from_dict(values)
