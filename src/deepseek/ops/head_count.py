"""How many attention heads had a gate, and how many of them were closed. Loads no torch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class HeadCount:
    """Heads counted anew for each token and layer."""

    total: int
    """That had a gate."""
    closed: int
    """Of them those whose gate was below the threshold: they gave zeros."""

    @property
    def share(self) -> float:
        """Closed ones of all; 0 where there were none."""
        return self.closed / self.total if self.total else 0.0

    def since(self, before: HeadCount) -> HeadCount:
        """Return what was counted after an earlier count."""
        return HeadCount(self.total - before.total, self.closed - before.closed)
