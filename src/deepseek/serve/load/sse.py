"""Server-sent events, as the WHATWG standard reads them: bytes in, the data of events out.

Source: HTML Living Standard, section 9.2.6, "Interpreting an event stream". Event types and ids are
read over: no server sends an answer's pieces under a type.
"""

from __future__ import annotations

from deepseek.errors import FormatError, describe

LONGEST_EVENT = 1 << 20
"""Bytes that an event may have: a stream that never ends a line is not kept for ever."""


class EventReader:
    """Reads a stream that comes in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._is_first = True

    def feed(self, received: bytes) -> list[str]:
        """Return the data of the events that are complete with these bytes.

        Raises:
            FormatError: an event is too long.
        """
        whole = self._rest + received
        if self._is_first:
            if len(whole) < 3 and b"\xef\xbb\xbf".startswith(whole):
                self._rest = whole
                return []
            whole = whole.removeprefix(b"\xef\xbb\xbf")
            self._is_first = False
        # a return at the end may be the first half of a line's end
        held = b"\r" if whole.endswith(b"\r") else b""
        lines = whole.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        events = []
        for line in lines:
            if line:
                self._read(line)
            elif self._data:
                events.append(b"\n".join(self._data).decode("utf-8", errors="replace"))
                self._data, self._size = [], 0
        if self._size + len(self._rest) > LONGEST_EVENT:
            must = f"at most {LONGEST_EVENT} bytes long"
            raise FormatError(describe("event", "a stream", must, self._rest[:60]))
        return events

    def _read(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)
