"""Lines of a batch's input file, read one by one and judged as OpenAI judges them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

MOST_LINES = 50_000
MOST_LINE_BYTES = 2**20
MOST_PROBLEMS = 100
"""So many are shown; one is enough to fail a batch."""
_MOST_ID_LETTERS = 512


@dataclasses.dataclass(frozen=True)
class RawLine:
    """A line as it lies in the file."""

    number: int
    """Counted from 1; empty lines count."""
    offset: int
    content: bytes
    """Without its end; cut where it is longer than `MOST_LINE_BYTES`."""


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """What a line asks for."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LineProblem:
    """Why a batch cannot be run, and which line it is."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's batch error."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ReadLine:
    """Where the request of a line lies, to be read again when it is run."""

    line: int
    custom_id: str
    offset: int
    size_bytes: int


def read_lines(
    file: BinaryIO, endpoint: str, most: int = MOST_LINES
) -> tuple[list[ReadLine], list[LineProblem]]:
    """Return the lines of a batch's input and what is wrong with it.

    Args:
        file: at its start.
        endpoint: what the batch was made for.
        most: lines that it may have.
    """
    problems: list[LineProblem] = []
    lines: dict[str, ReadLine] = {}
    for raw in raw_lines(file):
        if len(lines) >= most:
            message = f"The file has more than {most} lines."
            problems.append(LineProblem("too_many_tasks", message))
            break
        request = parse_line(raw, endpoint)
        if isinstance(request, LineProblem):
            problems.append(request)
        elif request.custom_id in lines:
            problems.append(_duplicate(request.custom_id, raw.number))
        else:
            name = request.custom_id
            lines[name] = ReadLine(raw.number, name, raw.offset, len(raw.content))
        if len(problems) >= MOST_PROBLEMS:
            break
    if not lines and not problems:
        problems.append(LineProblem("empty_file", "The input file is empty."))
    return list(lines.values()), problems


def raw_lines(file: BinaryIO) -> Iterator[RawLine]:
    """Yield the lines of a file that are not empty. Never holds more than one of them, however long
    it is."""
    number = offset = 0
    while content := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        start, offset = offset, offset + len(content)
        if not content.endswith(b"\n"):
            while rest := file.readline(MOST_LINE_BYTES):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
        if kept := content.rstrip(b"\r\n"):
            yield RawLine(number, start, kept)


def parse_line(line: RawLine, endpoint: str) -> BatchRequest | LineProblem:
    """Return the request of a line, or what is wrong with it.

    Args:
        line: from `raw_lines`.
        endpoint: what the batch was made for; every line must name it.
    """
    if len(line.content) > MOST_LINE_BYTES:
        message = f"This line is longer than {MOST_LINE_BYTES} bytes."
        return LineProblem("line_too_long", message, line.number)
    try:
        given = json.loads(line.content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        message = "This line is not parseable as valid JSON."
        return LineProblem("invalid_json_line", message, line.number)
    if not isinstance(given, dict):
        message = "This line is not a JSON object."
        return LineProblem("invalid_json_line", message, line.number)
    return _request(given, endpoint, line.number)


def _duplicate(custom_id: str, number: int) -> LineProblem:
    message = (
        f"The custom_id '{custom_id[:64]}' is a duplicate of another request. "
        "It must be unique within a batch."
    )
    return LineProblem("duplicate_custom_id", message, number, "custom_id")


def _request(given: dict[str, Any], endpoint: str, number: int) -> BatchRequest | LineProblem:
    for name in ("custom_id", "method", "url", "body"):
        if name not in given:
            message = f"Missing required parameter: '{name}'."
            return LineProblem("missing_required_parameter", message, number, name)
    custom_id, body = given["custom_id"], given["body"]
    if not isinstance(custom_id, str) or not _is_text(custom_id):
        message = f"'custom_id' must be text of 1 to {_MOST_ID_LETTERS} characters."
        return LineProblem("invalid_custom_id", message, number, "custom_id")
    if given["method"] != "POST":
        return LineProblem("invalid_method", "'method' must be 'POST'.", number, "method")
    if given["url"] != endpoint:
        message = f"The URL of this line does not match the batch's endpoint '{endpoint}'."
        return LineProblem("invalid_url", message, number, "url")
    if not isinstance(body, dict):
        return LineProblem("invalid_body", "'body' must be a JSON object.", number, "body")
    if body.get("stream"):
        message = "'stream' is not supported in a batch."
        return LineProblem("unsupported_parameter", message, number, "body.stream")
    return BatchRequest(custom_id, endpoint, body)


def _is_text(custom_id: str) -> bool:
    """Tell whether both databases can hold it."""
    if not 1 <= len(custom_id) <= _MOST_ID_LETTERS or "\0" in custom_id:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in custom_id)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
