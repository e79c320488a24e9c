"""Stop strings end the text wherever the token borders are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.generate.stop import StopMatcher


def passed(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    matcher, text = StopMatcher(stops), ""
    for part in parts:
        text += matcher.push(part)
        if matcher.stopped_by is not None:
            return text, True
    return text + matcher.flush(), False


@settings(max_examples=300, deadline=None)
@given(
    stops=st.lists(st.text("ab你", min_size=1, max_size=4), max_size=3),
    parts=st.lists(st.text("ab你", max_size=4), max_size=12),
)
def test_text_is_cut_at_the_first_stop(stops: list[str], parts: list[str]) -> None:
    text, is_stopped = passed(stops, parts)
    whole = "".join(parts)
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert is_stopped == bool(found)
    # of several stops, the one that is complete first ends the text
    assert text == (whole[: min(found)[1]] if found else whole)


def test_what_could_begin_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(part) for part in ("a", "E", "N", "x", "EE", "ND", "y")] == (
        ["a", "", "", "ENx", "E", "", "y"]
    )


def test_nothing_is_held_without_stops() -> None:
    assert StopMatcher([]).push("E") == "E"


@pytest.mark.parametrize(
    "parts", [["one STOP two"], ["one S", "TOP", " two"], list("one STOP two")]
)
def test_borders_do_not_matter(parts: list[str]) -> None:
    assert passed(["STOP", "\n\n"], parts) == ("one ", True)
