"""Lines of a batch's input are judged one by one, whatever bytes they are."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek.serve.state.batch_lines import (
    MOST_LINE_BYTES,
    MOST_PROBLEMS,
    BatchRequest,
    LineProblem,
    RawLine,
    parse_line,
    raw_lines,
    read_lines,
)

CHAT = "/v1/chat/completions"


def request(custom_id: Any = "a", **changes: Any) -> dict[str, Any]:
    """Return a good line with changes; None removes a field."""
    line = {
        "custom_id": custom_id,
        "method": "POST",
        "url": CHAT,
        "body": {"model": "m"},
        **changes,
    }
    return {name: value for name, value in line.items() if value is not None}


def parsed(line: Any) -> BatchRequest | LineProblem:
    content = line if isinstance(line, bytes) else json.dumps(line).encode()
    return parse_line(RawLine(7, 0, content), CHAT)


def test_a_good_line_is_a_request() -> None:
    assert parsed(request()) == BatchRequest("a", CHAT, {"model": "m"})


BAD = {
    "not JSON": (b"{", "invalid_json_line", None),
    "not UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line", None),
    "NaN": (b'{"custom_id": NaN}', "invalid_json_line", None),
    "too deep": (b"[" * 100_000, "invalid_json_line", None),
    "a huge number": (b"1" * 10_000, "invalid_json_line", None),
    "not an object": (b"[]", "invalid_json_line", None),
    "too long": (b" " * (MOST_LINE_BYTES + 1), "line_too_long", None),
    "no id": (request(None), "missing_required_parameter", "custom_id"),
    "no method": (request(method=None), "missing_required_parameter", "method"),
    "no url": (request(url=None), "missing_required_parameter", "url"),
    "no body": (request(body=None), "missing_required_parameter", "body"),
    "number as id": (request(1), "invalid_custom_id", "custom_id"),
    "empty id": (request(""), "invalid_custom_id", "custom_id"),
    "long id": (request("a" * 513), "invalid_custom_id", "custom_id"),
    "null byte in id": (request("a\0"), "invalid_custom_id", "custom_id"),
    "half a character in id": (request("\ud800"), "invalid_custom_id", "custom_id"),
    "another method": (request(method="GET"), "invalid_method", "method"),
    "another endpoint": (request(url="/v1/embeddings"), "invalid_url", "url"),
    "an admin route": (request(url="/admin/keys"), "invalid_url", "url"),
    "text as body": (request(body="{}"), "invalid_body", "body"),
    "a stream": (request(body={"stream": True}), "unsupported_parameter", "body.stream"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_told_as_openai_does(case: str) -> None:
    line, code, param = BAD[case]
    problem = parsed(line)
    assert isinstance(problem, LineProblem)
    assert (problem.code, problem.param, problem.line) == (code, param, 7)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    lines, problems = read_lines(io.BytesIO(content), CHAT)
    assert lines or problems


@given(st.lists(st.text(min_size=0, max_size=40), max_size=20), st.sampled_from(["\n", "\r\n"]))
@example(["", "a", "", "b"], "\r\n")
def test_lines_are_found_where_they_lie(texts: list[str], end: str) -> None:
    texts = ["".join(text.split()) for text in texts]
    content = end.join(texts).encode()
    found = list(raw_lines(io.BytesIO(content)))
    wanted = [(number, text) for number, text in enumerate(texts, 1) if text]
    assert [(line.number, line.content.decode()) for line in found] == wanted
    for line in found:
        assert content[line.offset : line.offset + len(line.content)] == line.content


def test_an_endless_line_is_not_held_in_memory() -> None:
    content = b"x" * (3 * MOST_LINE_BYTES) + b"\n" + json.dumps(request()).encode()
    lines = list(raw_lines(io.BytesIO(content)))
    assert [line.number for line in lines] == [1, 2]
    assert len(lines[0].content) == MOST_LINE_BYTES + 1
    assert lines[1].offset == 3 * MOST_LINE_BYTES + 1
    exact = b"x" * MOST_LINE_BYTES + b"\n"
    assert [len(line.content) for line in raw_lines(io.BytesIO(exact * 2))] == [MOST_LINE_BYTES] * 2


def file_of(*requests: dict[str, Any]) -> io.BytesIO:
    return io.BytesIO(b"".join(json.dumps(one).encode() + b"\n" for one in requests))


def test_duplicates_name_the_second_line() -> None:
    lines, problems = read_lines(file_of(request("a"), request("b"), request("a")), CHAT)
    assert [line.custom_id for line in lines] == ["a", "b"]
    assert [(one.code, one.line) for one in problems] == [("duplicate_custom_id", 3)]


def test_files_are_bounded() -> None:
    many = [request(f"{number}") for number in range(4)]
    assert len(read_lines(file_of(*many), CHAT, 4)[0]) == 4
    _, problems = read_lines(file_of(*many), CHAT, 3)
    assert [one.code for one in problems] == ["too_many_tasks"]
    _, problems = read_lines(io.BytesIO(b"{\n" * 10_000), CHAT)
    assert len(problems) == MOST_PROBLEMS
    assert read_lines(io.BytesIO(b"\n\n"), CHAT)[1][0].code == "empty_file"
