"""Whose line is next: tenants take turns, and one that must wait does not hold up the rest."""

from __future__ import annotations

import collections
from collections.abc import Iterable

EVERYONE = "\0"
"""Stands in for a tenant where the whole server refuses; no tenant is called so."""


class Turns:
    """Fair turns between tenants. Pure: the time is handed in."""

    def __init__(self, *, first_wait_s: float = 1.0, longest_wait_s: float = 60.0) -> None:
        """Begin with nobody waiting.

        Args:
            first_wait_s: after a first refusal; each further one doubles it.
            longest_wait_s: where doubling ends.
        """
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._running: collections.Counter[str] = collections.Counter()
        self._last_turn: dict[str, int] = {}
        self._refusals: collections.Counter[str] = collections.Counter()
        self._until: dict[str, float] = {}
        self._turn = 0

    def order(self, tenants: Iterable[str], now: float) -> list[str]:
        """Return those that may run a line now: who runs least first, then who waits longest."""
        ready = [name for name in set(tenants) if self._until.get(name, now) <= now]
        return sorted(ready, key=lambda name: (self._running[name], self._last_turn.get(name, 0)))

    def begin(self, tenant: str) -> None:
        """Count a line that is being run."""
        self._turn += 1
        self._running[tenant] += 1
        self._last_turn[tenant] = self._turn

    def end(self, tenant: str) -> None:
        """Count a line that is not run any more."""
        self._running[tenant] -= 1

    def accept(self, tenant: str) -> None:
        """Forget that a tenant was refused."""
        self._refusals.pop(tenant, None)
        self._until.pop(tenant, None)

    def refuse(self, tenant: str, now: float) -> None:
        """Let a tenant wait, longer each time it is refused again."""
        # Beyond 2^30 the longest wait has long been reached, and the power would overflow.
        doublings = min(self._refusals[tenant], 30)
        wait_s = min(self._first_wait_s * 2**doublings, self._longest_wait_s)
        self._refusals[tenant] += 1
        self._until[tenant] = now + wait_s

    def keep_only(self, tenants: Iterable[str]) -> None:
        """Forget tenants that have no batches any more."""
        kept = set(tenants)
        for table in (self._running, self._last_turn, self._refusals, self._until):
            for name in [name for name in table if name not in kept and not self._running[name]]:
                del table[name]
