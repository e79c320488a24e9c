"""Event streams: the same events however the bytes are cut, and nothing kept without end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import FormatError
from deepseek.serve.load import sse
from deepseek.serve.load.sse import EventReader


def read(stream: bytes, cuts: list[int]) -> list[str]:
    """Return the events of a stream that comes in pieces."""
    reader, events = EventReader(), []
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in pairwise(places):
        events += reader.feed(stream[start:end])
    return events


lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)
ends = st.sampled_from(["\n", "\r\n", "\r"])
others = st.sampled_from([": still here", "event: delta", "id: 7", "retry: 10", "dat: no", ":"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """Return a stream and the events that it has."""
    end = draw(ends)
    text, events = draw(st.sampled_from(["", "\ufeff"])), []
    for _ in range(draw(st.integers(0, 4))):
        data = draw(st.lists(lines, min_size=1, max_size=3))
        for line in data:
            space = " " if line.startswith(" ") else draw(st.sampled_from(["", " "]))
            text += f"data:{space}{line}{end}"
            if draw(st.booleans()):
                text += f"{draw(others)}{end}"
        text += end
        events.append("\n".join(data))
    return f"{text}: the end\n".encode(), events


@given(streams(), st.lists(st.integers(0, 120), max_size=12))
def test_events_do_not_depend_on_how_they_come(
    stream: tuple[bytes, list[str]], cuts: list[int]
) -> None:
    assert read(stream[0], cuts) == stream[1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_byte_alone(end: str) -> None:
    text = 'data: {"a": "é"}||data: one|data: two||: x||'.replace("|", end)
    stream = f"{text}: the end\n".encode()
    assert read(stream, list(range(len(stream)))) == ['{"a": "é"}', "one\ntwo"]


def test_blank_lines_and_comments_are_no_events() -> None:
    assert read(b"\n\n: ping\n\nevent: x\n\ndata: a\n\n\n\n", []) == ["a"]
    assert read(b"data\n\ndata:\n\n", []) == ["", ""]


def test_an_event_that_is_not_ended_is_none() -> None:
    assert read(b"data: a\n\ndata: b\n", []) == ["a"]


def test_broken_utf8_is_read_on() -> None:
    assert read(b"data: a\xffb\n\n", []) == ["a\ufffdb"]


@pytest.mark.parametrize("stream", [b"data: " + b"a" * 60, b"a" * 60, b"data: aaaaaaaa\n" * 9])
def test_an_endless_event_is_refused(stream: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "LONGEST_EVENT", 50)
    with pytest.raises(FormatError, match="at most 50 bytes long"):
        read(stream, list(range(0, 200, 7)))
    assert read(b"data: aaaaaaaaaaaaaaaaaaaa\n\n" * 9, []) == ["a" * 20] * 9
