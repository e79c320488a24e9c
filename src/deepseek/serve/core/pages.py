"""Pages of the key/value cache: who uses them, what they hold, which is handed out next."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepseek.errors import CapacityError, ConfigError, VerifyError, describe
from deepseek.serve.core.chain import CachedPage, Chain, PageHash, Root, page_hash
from deepseek.serve.core.eviction import FairLru

_MOST_COMPARED = 32
"""Pages behind the same text that are looked at for the one that begins as another text goes on."""


class Beginning(NamedTuple):
    """The part of a published page that another text begins its own page with."""

    page: int
    num_tokens: int


class PagePool:
    """A fixed number of pages, whose free ones are the cache of earlier prefixes.

    A page that nobody uses any more keeps its content and can be found by it until it is handed out
    again, so eviction costs nothing. Only pages that are full and computed are published, and they
    are never written again. A page is found only by requests of its root (tenant and adapter), and
    only behind the very page that it was computed behind. A text that leaves the published ones
    within a page may begin its own with a copy of what it has in common.

    Every operation takes constant time for each page that it touches.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        hash_: PageHash = page_hash,
        *,
        least_copied: int | None = None,
    ) -> None:
        """Make a pool of empty pages.

        Args:
            num_pages: pages there are.
            page_size: tokens that a page holds.
            hash_: digest of a page; however bad, it can cost hits only.
            least_copied: tokens in common that a page is copied for; None where pages cannot be.

        Raises:
            ConfigError: a number is not positive.
        """
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ConfigError(describe(name, "PagePool", "at least 1", value))
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_evicted = 0
        """Pages that were handed out again while they still held something."""
        self._hash = hash_
        self._refs = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._evictable = FairLru()
        self._by_digest: dict[bytes, CachedPage] = {}
        self._by_page: dict[int, CachedPage] = {}
        self._tainted: set[int] = set()
        self._least_copied = least_copied
        self._firsts: dict[Root, dict[CachedPage, None]] = {}
        """The published pages at the start of a text, the newest last."""
        self._copy_of: dict[int, int] = {}
        """Pages that began as the copy of another, as long as they hold something."""

    @property
    def num_free(self) -> int:
        """Pages that can be handed out, the cached ones among them."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Free pages that still hold something."""
        return len(self._evictable)

    def num_cached_of(self, tenant: str) -> int:
        """Return how many free pages hold something of a tenant."""
        return self._evictable.num_pages(tenant)

    def num_users(self, page: int) -> int:
        """Return how many requests use a page."""
        return self._refs[page]

    def cached(self, page: int) -> CachedPage | None:
        """Return what is published of a page."""
        return self._by_page.get(page)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def match(self, chain: Chain, tokens: Sequence[int]) -> list[int]:
        """Return the pages of the longest cached prefix, without taking them.

        They never hold all tokens: the last one has to be computed, for something is to be chosen
        behind it.
        """
        pages: list[int] = []
        parent = None
        for index in range((len(tokens) - 1) // self.page_size):
            parent = self._find(chain, index, parent, tokens)
            if parent is None:
                break
            pages.append(parent.page)
        return pages

    def beginning(
        self, chain: Chain, pages: Sequence[int], tokens: Sequence[int]
    ) -> Beginning | None:
        """Return the page that has most in common with what follows the pages that `match` found,
        or None where that is too little. It is not taken: it is to be copied in the step that is
        being planned, before anything of that step is computed.
        """
        if self._least_copied is None:
            return None
        parent = self._by_page[pages[-1]] if pages else None
        near = self._firsts.get(chain.root, {}) if parent is None else parent.children
        start = len(pages) * self.page_size
        rest = tokens[start : min(start + self.page_size, len(tokens) - 1)]
        best = None
        for entry in itertools.islice(reversed(near), _MOST_COMPARED):
            count = _num_common(entry.tokens, rest)
            if count >= self._least_copied and (best is None or count > best.num_tokens):
                best = Beginning(entry.page, count)
        return best

    def copied(self, page: int, source: int) -> None:
        """Take note that a page begins as a copy of another: distrust of that is one of it."""
        self._copy_of[page] = source

    def digests(self, chain: Chain, tokens: Sequence[int], start: int) -> list[bytes]:
        """Return the digests of the full pages from number `start` on."""
        count = len(tokens) // self.page_size
        chain.extend(tokens, self.page_size, count, self._hash)
        return chain.digests[start:count]

    def share(self, chain: Chain, pages: Sequence[int]) -> None:
        """Use pages that `match` has just found for a chain."""
        for page in pages:
            if self._refs[page] == 0:
                self._evictable.remove(self._by_page[page].root.tenant, page)
            self._refs[page] += 1
        chain.link(self._by_page[pages[-1]] if pages else None, len(pages))

    def allocate(self, count: int) -> list[int]:
        """Return so many pages that nobody uses; they hold nothing any more.

        Raises:
            CapacityError: fewer are free.
        """
        if count > self.num_free:
            must = f"at most the {self.num_free} free pages"
            raise CapacityError(describe("count", "PagePool.allocate", must, count))
        while len(self._blank) < count:
            self._unpublish(self._by_page[self._evictable.oldest()])
            self.num_evicted += 1
        pages = [self._blank.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
            self._tainted.discard(page)
            self._copy_of.pop(page, None)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Stop using the pages of a text; its last page is evicted before its first."""
        for page in reversed(pages):
            if self._refs[page] < 1:
                raise VerifyError(f"page {page} is released and nobody uses it")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._put_back(page)

    def publish(self, chain: Chain, tokens: Sequence[int], pages: Sequence[int], end: int) -> None:
        """Let others find the full pages of a text whose first `end` tokens are computed.

        Of a page that somebody else has published in the meantime, the text keeps its own copy.
        """
        if chain.tip is not None and not chain.tip.is_published:
            chain.unlink()
        for index in range(chain.num_linked, end // self.page_size):
            if chain.is_closed or pages[index] in self._tainted:
                chain.is_closed = True
                return
            entry = self._find(chain, index, chain.tip, tokens)
            if entry is None:
                entry = self._link(chain, index, tokens, pages[index])
            if entry is None:
                chain.is_closed = True
                return
            chain.link(entry, index + 1)

    def forget(self, pages: Sequence[int]) -> None:
        """Make pages, their copies, and all that was computed behind them, unfindable until they
        are handed out again: their numbers cannot be trusted."""
        bad, fresh = set(pages), set(pages)
        while fresh:
            fresh = {page for page, source in self._copy_of.items() if source in fresh} - bad
            bad |= fresh
        self._tainted |= bad
        for page in bad:
            entry = self._by_page.get(page)
            if entry is not None:
                self._unpublish(entry)

    def blank_pages(self) -> list[int]:
        """Return the free pages that hold nothing."""
        return list(self._blank)

    def evictable_pages(self) -> list[int]:
        """Return the free pages that still hold something."""
        return self._evictable.pages()

    def published(self) -> Iterator[CachedPage]:
        """Yield everything that can be found."""
        return iter(self._by_digest.values())

    def expected_digest(self, entry: CachedPage) -> bytes:
        """Return the digest that a published page must have, computed afresh from its tokens."""
        chain, tokens, count = Chain(entry.root), list[int](), 0
        line: CachedPage | None = entry
        while line is not None:
            tokens[:0] = line.tokens
            line, count = line.parent, count + 1
        chain.extend(tokens, self.page_size, count, self._hash)
        return chain.digests[-1]

    def _find(
        self, chain: Chain, index: int, parent: CachedPage | None, tokens: Sequence[int]
    ) -> CachedPage | None:
        chain.extend(tokens, self.page_size, index + 1, self._hash)
        entry = self._by_digest.get(chain.digests[index])
        if entry is None or not entry.holds(chain.root, parent, self._tokens_of(index, tokens)):
            return None
        return entry

    def _link(
        self, chain: Chain, index: int, tokens: Sequence[int], page: int
    ) -> CachedPage | None:
        """Publish a page, or return None where its digest already stands for something else."""
        digest, parent = chain.digests[index], chain.tip
        if digest in self._by_digest or page in self._by_page:
            return None
        entry = CachedPage(page, chain.root, parent, self._tokens_of(index, tokens), digest)
        self._by_digest[digest] = entry
        self._by_page[page] = entry
        self._siblings(entry)[entry] = None
        return entry

    def _siblings(self, entry: CachedPage) -> dict[CachedPage, None]:
        """Return the published pages behind the same text."""
        if entry.parent is not None:
            return entry.parent.children
        return self._firsts.setdefault(entry.root, {})

    def _tokens_of(self, index: int, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokens[index * self.page_size : (index + 1) * self.page_size])

    def _unpublish(self, entry: CachedPage) -> None:
        """Make a page and those behind it unfindable."""
        siblings = self._siblings(entry)
        siblings.pop(entry, None)
        if not siblings and entry.parent is None:
            del self._firsts[entry.root]
        rest = [entry]
        while rest:
            entry = rest.pop()
            rest.extend(entry.children)
            entry.children.clear()
            entry.is_published = False
            del self._by_digest[entry.digest]
            del self._by_page[entry.page]
            if self._refs[entry.page] == 0:
                self._evictable.remove(entry.root.tenant, entry.page)
                self._blank.append(entry.page)

    def _put_back(self, page: int) -> None:
        entry = self._by_page.get(page)
        if entry is None:
            self._blank.append(page)
        else:
            self._evictable.add(entry.root.tenant, page)


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    for place, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return place
    return min(len(one), len(other))
