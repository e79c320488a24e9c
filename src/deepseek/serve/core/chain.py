"""What a page is known by: its tokens, all tokens before them, and whose they are."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Root(NamedTuple):
    """Who may share pages: the requests of one tenant under one adapter, and nobody else."""

    tenant: str
    adapter: str | None


PageHash = Callable[[bytes, bytes], bytes]
"""Gives the digest of a page from the digest before it and the bytes of its tokens. Digests only
speed up the search: what is found by one is compared token by token."""


def page_hash(before: bytes, content: bytes) -> bytes:
    """Return the digest of a page: BLAKE2b of its content, keyed by the digest before it."""
    return hashlib.blake2b(content, digest_size=16, key=before).digest()


def root_digest(root: Root) -> bytes:
    """Return the digest before the first page."""
    return hashlib.blake2b(repr(tuple(root)).encode(), digest_size=16).digest()


class CachedPage:
    """A page that may be found by others: what it holds, and the page before it."""

    __slots__ = ("children", "digest", "is_published", "page", "parent", "root", "tokens")

    def __init__(
        self,
        page: int,
        root: Root,
        parent: CachedPage | None,
        tokens: tuple[int, ...],
        digest: bytes,
    ) -> None:
        """Describe a full page behind `parent`, or at the start of a text."""
        self.page = page
        self.root = root
        self.parent = parent
        self.tokens = tokens
        self.digest = digest
        self.children: dict[CachedPage, None] = {}
        """The pages published behind it, the newest last."""
        self.is_published = True

    def holds(self, root: Root, parent: CachedPage | None, tokens: tuple[int, ...]) -> bool:
        """Return whether it is the page of just these tokens behind just that page."""
        return self.parent is parent and self.tokens == tokens and self.root == root


class Chain:
    """The digests of one text's pages, and how far its pages have been published."""

    __slots__ = ("_root_digest", "digests", "is_closed", "num_linked", "root", "tip")

    def __init__(self, root: Root) -> None:
        """Begin before the first page."""
        self.root = root
        self.digests: list[bytes] = []
        self.tip: CachedPage | None = None
        """The published page that holds the last of the first `num_linked` pages."""
        self.num_linked = 0
        self.is_closed = False
        """Whether no further page of this text may be published."""
        self._root_digest = root_digest(root)

    def link(self, tip: CachedPage | None, num_linked: int) -> None:
        """Say that so many pages are published, the last of them `tip`."""
        self.tip, self.num_linked = tip, num_linked

    def unlink(self) -> None:
        """Go back to before the first page; the digests stay, for the text does."""
        self.tip, self.num_linked, self.is_closed = None, 0, False

    def extend(self, tokens: Sequence[int], page_size: int, count: int, hash_: PageHash) -> None:
        """Compute the digests of the first `count` pages that are not known yet."""
        for index in range(len(self.digests), count):
            before = self.digests[-1] if index else self._root_digest
            content = array("q", tokens[index * page_size : (index + 1) * page_size])
            self.digests.append(hash_(before, content.tobytes()))
