"""Prefixes that are being computed now, so that nobody computes them a second time."""

from __future__ import annotations

from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.policy import Entry


class Computing:
    """Which running request is about to publish which page of its prompt.

    One that wants the same page next waits until it is there. It waits for running requests of its
    own or a better priority only: these advance at least as soon as it would itself, and when one
    leaves or is turned back, its pages are no longer waited for.
    """

    def __init__(self, pool: PagePool) -> None:
        """Watch the prompts that are computed into `pool`."""
        self._pool = pool
        self._by_digest: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._by_digest)

    def begin(self, entry: Entry) -> None:
        """Note the pages that a request which has just got its cached ones will publish."""
        request = entry.request
        if not request.writes_cache:
            return
        digests = self._pool.digests(entry.chain, request.prompt, len(request.pages))
        entry.computing = digests[::-1]
        for digest in digests:
            self._by_digest.setdefault(digest, entry)

    def advance(self, entry: Entry) -> None:
        """Drop the pages that are computed by now, whether or not they could be published."""
        left = len(entry.request.prompt) // self._pool.page_size
        left -= entry.request.num_computed // self._pool.page_size
        while len(entry.computing) > max(left, 0):
            self._drop(entry, entry.computing.pop())

    def end(self, entry: Entry) -> None:
        """Drop all pages of a request that stops running."""
        while entry.computing:
            self._drop(entry, entry.computing.pop())

    def is_awaited_by(self, entry: Entry, num_found: int) -> bool:
        """Return whether the page that a request wants behind those it found is on its way."""
        request = entry.request
        if num_found >= (len(request.tokens) - 1) // self._pool.page_size:
            return False
        writer = self._by_digest.get(entry.chain.digests[num_found])
        return writer is not None and writer.request.priority <= request.priority

    def _drop(self, entry: Entry, digest: bytes) -> None:
        if self._by_digest.get(digest) is entry:
            del self._by_digest[digest]
