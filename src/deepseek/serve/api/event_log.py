"""Events of one stream, for those who come late or come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]


class EventLog:
    """Keeps the events of a stream, and hands them to whoever follows. One event loop uses it."""

    def __init__(self, events: Iterable[Event]) -> None:
        """Begin with some events."""
        self._events = list(events)
        self._is_ended = False
        self._changed = asyncio.Event()

    def add(self, event: Event) -> None:
        """Add an event, whose `sequence_number` is how many there were."""
        self._events.append(event)
        self._tell()

    def end(self) -> None:
        """Say that no more will come."""
        self._is_ended = True
        self._tell()

    async def follow(self, after: int = -1) -> AsyncGenerator[Event]:
        """Yield the events behind number `after`, as they come, to the end."""
        place = after + 1
        while True:
            changed = self._changed
            while place < len(self._events):
                yield self._events[place]
                place += 1
            if self._is_ended:
                return
            await changed.wait()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
