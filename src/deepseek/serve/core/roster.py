"""Who runs and who waits; every move between the two keeps pages and shares in step."""

from __future__ import annotations

import bisect
import dataclasses

from deepseek.serve.core.computing import Computing
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.policy import Entry, FairShare, WaitingQueue, rank_of
from deepseek.serve.core.request import FinishReason, Phase

DISTRUSTED: frozenset[FinishReason] = frozenset({"error", "repetition"})
"""Ends after which the pages of a request are not to be found by others."""


@dataclasses.dataclass
class Counters:
    """What has happened since the start."""

    queried_tokens: int = 0
    """Tokens of prompts that were looked up in the cache, each prompt once."""
    cached_tokens: int = 0
    """Those of them that were found."""
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Guesses that were right."""


class Roster:
    """All requests that are not finished."""

    def __init__(self, pool: PagePool) -> None:
        """Begin with no requests, on a pool that is all free."""
        self.pool = pool
        self.share = FairShare()
        self.waiting = WaitingQueue(self.share)
        self.running: list[Entry] = []
        """The best ranked first."""
        self.computing = Computing(pool)
        self.counters = Counters()

    def enter(self, entry: Entry) -> None:
        """Let a new request wait."""
        self.share.enter(entry.tenant)
        self.waiting.push(entry)

    def admit(self, entry: Entry, pages: list[int], num_begun: int, now_s: float) -> None:
        """Let a waiting request run, with the pages that were found for it.

        Args:
            entry: the request.
            pages: found for it.
            num_begun: tokens that the page behind them begins with, which is then a copy.
            now_s: the time.
        """
        request = entry.request
        self.waiting.remove(entry)
        self.pool.share(entry.chain, pages)
        request.pages = [*pages, *self.pool.allocate(1 if num_begun else 0)]
        request.num_computed = len(pages) * self.pool.page_size + num_begun
        request.phase = Phase.RUNNING
        bisect.insort(self.running, entry, key=rank_of)
        self.computing.begin(entry)
        if request.first_run_s is None:
            request.first_run_s = now_s
            request.num_cached = request.num_computed
            self.counters.queried_tokens += len(request.prompt) if request.reads_cache else 0
            self.counters.cached_tokens += request.num_cached
            self.share.charge(entry.tenant, len(request.prompt) - request.num_cached)

    def preempt(self, entry: Entry) -> None:
        """Take the pages of a running request, which then waits; until others need the room it
        may find them again."""
        self._stop(entry)
        entry.request.phase = Phase.WAITING
        entry.request.num_preempted += 1
        self.counters.preemptions += 1
        self.waiting.push(entry)

    def leave(self, entry: Entry, reason: FinishReason) -> None:
        """Finish a request: it gives up its pages, or its place among those that wait."""
        if reason in DISTRUSTED:
            self.distrust(entry)
        if entry.request.phase is Phase.WAITING:
            self.waiting.remove(entry)
        else:
            self._stop(entry)
        entry.request.phase = Phase.FINISHED
        entry.request.finish_reason = reason
        self.share.leave(entry.tenant)

    def distrust(self, entry: Entry) -> None:
        """Make what a request computed, or computed upon, unfindable from now on."""
        entry.request.writes_cache = False
        self.computing.end(entry)
        self.pool.forget(entry.request.pages)

    def publish(self, entry: Entry) -> None:
        """Let others find the full pages that a running request has computed."""
        request = entry.request
        if request.writes_cache:
            self.pool.publish(entry.chain, request.tokens, request.pages, request.num_computed)
        self.computing.advance(entry)

    def _stop(self, entry: Entry) -> None:
        request = entry.request
        del self.running[bisect.bisect_left(self.running, entry.rank, key=rank_of)]
        self.computing.end(entry)
        self.pool.release(request.pages)
        entry.chain.unlink()
        request.pages = []
        request.drafts = []
        request.num_computed = 0
