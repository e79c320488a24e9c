"""A run that is asked to stop: it ends where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop; its state is saved."""


class StopRequest:
    """Whether SIGINT or SIGTERM came."""

    is_made = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take these signals for requests while what is inside runs."""

        def note(*_: object) -> None:
            self.is_made = True

        kinds = (signal.SIGINT, signal.SIGTERM)
        old = [signal.signal(kind, note) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, old, strict=True):
                signal.signal(kind, handler)
