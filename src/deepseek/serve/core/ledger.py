"""Checks that no page is lost or shared wrongly, and measures how much of the pages is unused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from deepseek.errors import VerifyError
from deepseek.serve.core.chain import CachedPage, Root
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.request import Phase, Request
from deepseek.serve.core.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Raise if an invariant of requests and pages is broken. Meant for tests: it looks at all.

    Raises:
        VerifyError: a page is lost, held by too many or too few, shared across tenants or adapters,
            writable by two, or published as something it does not hold; or a request's pages do not
            cover what it has computed.
    """
    _check_pages_are_all_there(scheduler.pool, scheduler.running)
    _check_published(scheduler.pool)
    for request in scheduler.running:
        _check_running(scheduler, request)
    for request in scheduler.waiting:
        if request.pages or request.num_computed or request.phase is not Phase.WAITING:
            raise VerifyError(f"request {request.id} waits and holds {len(request.pages)} pages")


@dataclasses.dataclass(frozen=True)
class Waste:
    """How many token positions are reserved for the running requests, and how many hold a token."""

    held: int
    """Positions with a token; one that several requests share counts once."""
    held_unshared: int
    """The same, with one that several requests share counted for each."""
    reserved: int
    """Positions of all pages that are used."""
    contiguous: int
    """Positions that slots of the context's length would reserve, one for each running request."""

    @property
    def share(self) -> float:
        """Return the share of the reserved positions that holds nothing."""
        return _empty_share(self.held, self.reserved)

    @property
    def contiguous_share(self) -> float:
        """Return the same for contiguous slots holding the same tokens without sharing any."""
        return _empty_share(self.held_unshared, self.contiguous)


def waste(scheduler: Scheduler) -> Waste:
    """Return how much of what is reserved at this moment is not used."""
    page_size = scheduler.pool.page_size
    filled: dict[int, int] = {}
    for request in scheduler.running:
        for index, page in enumerate(request.pages):
            held = min(max(request.num_computed - index * page_size, 0), page_size)
            filled[page] = max(filled.get(page, 0), held)
    return Waste(
        held=sum(filled.values()),
        reserved=len(filled) * page_size,
        contiguous=scheduler.num_running * scheduler.config.context,
        held_unshared=sum(request.num_computed for request in scheduler.running),
    )


def _empty_share(held: int, reserved: int) -> float:
    return (reserved - held) / reserved if reserved else 0.0


def _check_pages_are_all_there(pool: PagePool, running: Sequence[Request]) -> None:
    users = Counter(page for request in running for page in request.pages)
    free = Counter([*pool.blank_pages(), *pool.evictable_pages()])
    for page in range(pool.num_pages):
        if pool.num_users(page) != users[page]:
            raise VerifyError(
                f"page {page} counts {pool.num_users(page)} users and has {users[page]}"
            )
        if (users[page] > 0) + free[page] != 1:
            raise VerifyError(
                f"page {page} has {users[page]} users and is {free[page]} times among the free"
            )
    if len(free) + len(users) != pool.num_pages or pool.num_free != sum(free.values()):
        raise VerifyError(f"{len(free)} free and {len(users)} used pages of {pool.num_pages}")
    for page in pool.evictable_pages():
        if pool.cached(page) is None:
            raise VerifyError(f"page {page} is cached and nothing is known of it")
    for page in pool.blank_pages():
        if pool.cached(page) is not None:
            raise VerifyError(f"page {page} is blank and published")


def _check_published(pool: PagePool) -> None:
    for entry in pool.published():
        if pool.cached(entry.page) is not entry or not entry.is_published:
            raise VerifyError(f"page {entry.page} is published as what it does not hold")
        if len(entry.tokens) != pool.page_size:
            raise VerifyError(f"page {entry.page} is published and is not full")
        if entry.digest != pool.expected_digest(entry):
            raise VerifyError(f"page {entry.page} is published under a wrong digest")
        parent = entry.parent
        if parent is None:
            continue
        if not parent.is_published or parent.root != entry.root or entry not in parent.children:
            raise VerifyError(f"page {entry.page} is published behind a page that cannot be found")


def _check_running(scheduler: Scheduler, request: Request) -> None:
    pool, size = scheduler.pool, scheduler.pool.page_size
    if not 0 <= request.num_computed < len(request.tokens):
        raise VerifyError(f"request {request.id} has computed all or more than its tokens")
    if len(request.pages) * size < request.num_computed:
        raise VerifyError(f"request {request.id} has computed more than its pages hold")
    if len(set(request.pages)) != len(request.pages):
        raise VerifyError(f"request {request.id} holds a page twice")
    root = Root(request.tenant, request.adapter)
    for index, page in enumerate(request.pages):
        entry = pool.cached(page)
        is_full = (index + 1) * size <= request.num_computed
        if not is_full and (entry is not None or pool.num_users(page) != 1):
            raise VerifyError(f"page {page} is written by {request.id} and others can read it")
        if entry is not None and _line(entry) != (root, request.tokens[: (index + 1) * size]):
            raise VerifyError(f"page {page} of {request.id} is published as what it does not hold")


def _line(entry: CachedPage) -> tuple[Root, list[int]]:
    """Return whose a published page is and all tokens up to its end."""
    root, tokens = entry.root, list(entry.tokens)
    while entry.parent is not None:
        entry = entry.parent
        tokens[:0] = entry.tokens
    return root, tokens
