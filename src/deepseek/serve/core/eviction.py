"""Which cached page goes first: the least recently used one of the tenant that holds the most."""

from __future__ import annotations

from collections import OrderedDict


class FairLru:
    """Pages that nobody uses and that still hold something, by tenant, oldest first.

    One who floods the cache thereby evicts himself: a small tenant loses a page only while nobody
    holds more than it does. Every operation takes constant time; tenants are kept sorted by the
    number of their pages, which changes by one at a time.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._pages: dict[str, OrderedDict[int, None]] = {}
        self._tenants_by_count: dict[int, OrderedDict[str, None]] = {}
        self._most = 0
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def num_pages(self, tenant: str) -> int:
        """Return how many pages of a tenant are here."""
        return len(self._pages.get(tenant, ()))

    def pages(self) -> list[int]:
        """Return all pages, each tenant's oldest first."""
        return [page for pages in self._pages.values() for page in pages]

    def add(self, tenant: str, page: int) -> None:
        """Take in a page that has just been used for the last time."""
        pages = self._pages.setdefault(tenant, OrderedDict())
        pages[page] = None
        self._total += 1
        self._recount(tenant, len(pages) - 1, len(pages))

    def remove(self, tenant: str, page: int) -> None:
        """Take out a page: it is used again, or no longer holds anything."""
        pages = self._pages[tenant]
        del pages[page]
        self._total -= 1
        if not pages:
            del self._pages[tenant]
        self._recount(tenant, len(pages) + 1, len(pages))

    def oldest(self) -> int:
        """Return the page that goes first; there must be one."""
        tenant = next(iter(self._tenants_by_count[self._most]))
        return next(iter(self._pages[tenant]))

    def _recount(self, tenant: str, before: int, after: int) -> None:
        if before:
            equals = self._tenants_by_count[before]
            del equals[tenant]
            if not equals:
                del self._tenants_by_count[before]
        if after:
            self._tenants_by_count.setdefault(after, OrderedDict())[tenant] = None
        if after > before:
            self._most = max(self._most, after)
        elif self._most not in self._tenants_by_count:
            self._most = after
