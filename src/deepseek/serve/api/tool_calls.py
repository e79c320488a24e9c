"""Finding the calls of tools in what a model writes: one pass over the text, JSON only."""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import Any, Literal

OPENING = "<tool_call>"
CLOSING = "</tool_call>"
MAX_DEPTH = 64
_MAX_HELD_SPACES = 64


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a function, complete and with arguments that are a JSON object."""

    id: str
    name: str
    arguments: str
    """A JSON object as text."""


Piece = str | Call


class ToolCallParser:
    """Splits a text, as it comes, into plain text and calls.

    A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere, or, where the
    whole answer begins with it, the bare object or a list of such objects (`parameters` is taken
    for `arguments`). It is given out when its JSON is complete and names a known function; anything
    else is plain text, however much it looks like a call, so that nobody gets half a call. Each
    character is looked at once, and held text is bounded by one call.
    """

    def __init__(
        self, names: frozenset[str], *, takes_bare: bool = True, max_calls: int | None = None
    ) -> None:
        """Look for calls of `names`.

        Args:
            names: of the functions that can be called.
            takes_bare: whether a call may stand without tags.
            max_calls: further calls are left out; None for no bound.
        """
        self._names = names
        self._takes_bare = takes_bare
        self._max_calls = max_calls
        self._place: Literal["start", "text", "call", "bare", "behind"] = "start"
        self._held = ""
        self._spaces = ""
        self._json = _JsonExtent()
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """Take more text and return what is settled."""
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """Return what was held back, now that the text has ended."""
        held, self._held = self._json.take() + self._held, ""
        if self._place == "call":
            return [self._spaces + OPENING + held]
        if self._place in ("behind", "text") and self.num_calls:
            held = held.rstrip()
        return [held] if held else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Settle one more part of the held text; False when more text is needed."""
        if self._place == "start":
            return self._begin()
        if self._place == "text":
            return self._pass_text(pieces)
        if self._place == "behind":
            return self._skip_closing()
        return self._read_json(pieces)

    def _begin(self) -> bool:
        first = self._held.lstrip()[:1]
        if not first and len(self._held) <= _MAX_HELD_SPACES:
            return False
        is_bare = self._takes_bare and first in ("{", "[")
        self._place = "bare" if is_bare else "text"
        return True

    def _pass_text(self, pieces: list[Piece]) -> bool:
        before, tag, behind = self._held.partition(OPENING)
        if tag:
            content = before.rstrip()
            self._give(pieces, content)
            self._spaces = before[len(content) :]
            self._place, self._held = "call", behind
            return True
        cut = len(before) - _overlap(before)
        kept_spaces = cut - len(before[:cut].rstrip())
        cut -= min(kept_spaces, _MAX_HELD_SPACES)
        self._give(pieces, before[:cut])
        self._held = before[cut:]
        return False

    def _read_json(self, pieces: list[Piece]) -> bool:
        used = self._json.push(self._held)
        self._held = self._held[used:]
        if self._json.is_open:
            return False
        raw, is_bare = self._json.take(), self._place == "bare"
        calls = _calls(raw, self._names, takes_list=is_bare)
        if calls:
            self._give_calls(pieces, calls)
            self._place = "behind"
        else:
            self._give(pieces, raw if is_bare else self._spaces + OPENING + raw)
            self._place = "text"
        return True

    def _skip_closing(self) -> bool:
        text = self._held.lstrip()
        if text.startswith(CLOSING):
            self._held, self._place = text[len(CLOSING) :], "text"
            return True
        if CLOSING.startswith(text):
            self._held = text
            return False
        self._held, self._place = text, "text"
        return True

    def _give(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(text)

    def _give_calls(self, pieces: list[Piece], calls: list[Call]) -> None:
        room = len(calls) if self._max_calls is None else self._max_calls - self.num_calls
        pieces.extend(calls[: max(0, room)])
        self.num_calls += min(len(calls), max(0, room))


class _JsonExtent:
    """Finds the end of a JSON object or list; what is not one ends at once."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self._parts = []
        self._depth = 0
        self._in_string = self._is_escaped = False
        self.is_open = True

    def push(self, text: str) -> int:
        """Take text up to the end of the value; return how many characters were taken."""
        used = len(text)
        for place, sign in enumerate(text):
            self._take(sign)
            if not self.is_open:
                used = place + 1
                break
        self._parts.append(text[:used])
        return used

    def take(self) -> str:
        """Return what was taken, and begin anew."""
        text = "".join(self._parts)
        self._reset()
        return text

    def _take(self, sign: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif sign == "\\":
                self._is_escaped = True
            elif sign == '"':
                self._in_string = False
        elif sign in "{[":
            self._depth += 1
            self.is_open = self._depth <= MAX_DEPTH
        elif sign in "}]":
            self._depth -= 1
            self.is_open = self._depth > 0
        elif self._depth == 0:
            self.is_open = sign.isspace()
        elif sign == '"':
            self._in_string = True


def _calls(raw: str, names: frozenset[str], *, takes_list: bool) -> list[Call] | None:
    """Return the calls of a JSON text, or None if it is anything else."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    found = value if takes_list and isinstance(value, list) else [value]
    calls = [_call(item, names) for item in found]
    return [call for call in calls if call] if calls and all(calls) else None


def _call(value: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return None
    return Call(new_call_id(), value["name"], text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _overlap(text: str) -> int:
    """Return the length of the longest end of `text` that begins the opening tag."""
    longest = min(len(text), len(OPENING) - 1)
    ends = (size for size in range(longest, 0, -1) if OPENING.startswith(text[-size:]))
    return next(ends, 0)


def new_call_id() -> str:
    """Return a fresh id of a call."""
    return f"call_{secrets.token_hex(12)}"
