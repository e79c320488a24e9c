"""A clock that moves only when told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Clock:
    """Seconds since 1970, set by hand."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now
