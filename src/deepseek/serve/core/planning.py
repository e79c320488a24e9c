"""One step in the making: tokens of the budget and pages of the pool, handed out in turn."""

from __future__ import annotations

import math

from deepseek.serve.core.drafting import DraftControl, Drafter
from deepseek.serve.core.policy import Entry, turn
from deepseek.serve.core.request import PageCopy, Work
from deepseek.serve.core.roster import Roster


class StepPlan:
    """Which requests advance, by how many tokens each.

    Filled in this order: a token for each request that decodes; chunks of prompts, of running
    requests and of waiting ones that are admitted, by turn; guesses, from what is left over.
    A request that is short of pages takes them from the worst ranked running one, never from a
    better one; where there is none to take from, it keeps what it has and waits a step. In a step
    that turned a request back there are no guesses, and only a better priority is admitted.
    """

    def __init__(self, roster: Roster, budget: int, max_running: int, now_s: float) -> None:
        """Begin a step of at most `budget` tokens and `max_running` requests."""
        self._roster = roster
        self._pool = roster.pool
        self._max_running = max_running
        self._now_s = now_s
        self._counts: dict[Entry, int] = {}
        self._copies: dict[Entry, PageCopy] = {}
        self._closed_from = math.inf
        self.budget = budget
        """Tokens that may still be handed out."""

    def decode(self) -> None:
        """Give each running request that lacks one token its token."""
        for entry in tuple(self._roster.running):
            if entry.is_running and entry.num_wanted == 1:
                self._give(entry)

    def compute_prompts(self) -> None:
        """Give chunks to running requests that lack more, and to waiting ones, by turn."""
        share, waiting = self._roster.share, self._roster.waiting
        behind = [entry for entry in self._roster.running if entry.num_wanted > 1]
        held: list[Entry] = []
        is_open = True
        while self.budget > 0:
            runner = min(behind, key=lambda entry: turn(entry, share), default=None)
            newcomer = waiting.first() if is_open else None
            if newcomer is not None and newcomer.request.priority >= self._closed_from:
                newcomer = None
            if runner is not None and (
                newcomer is None or turn(runner, share) < turn(newcomer, share)
            ):
                behind.remove(runner)
                if runner.is_running:
                    self._give(runner)
            elif newcomer is not None:
                is_open = self._admit(newcomer, held)
            else:
                break
        for entry in held:
            waiting.push(entry)

    def add_drafts(self, drafter: Drafter, control: DraftControl, context: int) -> None:
        """Give guesses to requests that decode, out of free pages and unused tokens only."""
        if self._closed_from < math.inf:
            return
        num_tokens = sum(self._counts.values())
        for entry in self._roster.running:
            if self.budget < 1:
                return
            request = entry.request
            if self._counts.get(entry) != 1 or entry.num_wanted != 1:
                continue
            room = (len(request.pages) + self._pool.num_free) * self._pool.page_size
            most = min(
                control.most(request, num_tokens, drafter.guess_s),
                self.budget,
                request.max_tokens - request.num_chosen - 1,
                context - len(request.tokens) - 1,
                room - len(request.tokens),
            )
            if most < 1:
                continue
            request.drafts = list(drafter.draft(request, most))[:most]
            short = self._pool.pages_for(len(request.tokens) + len(request.drafts))
            request.pages += self._pool.allocate(short - len(request.pages))
            self.budget -= len(request.drafts)
            num_tokens += len(request.drafts)

    def work(self) -> dict[Entry, Work]:
        """Return the work of each request that advances, the best ranked first."""
        return {
            entry: self._work(entry, self._counts[entry])
            for entry in self._roster.running
            if entry in self._counts
        }

    def copies(self) -> tuple[PageCopy, ...]:
        """Return the copies of pages that the work needs."""
        return tuple(self._copies.values())

    def _work(self, entry: Entry, count: int) -> Work:
        request = entry.request
        start = request.num_computed
        tokens = (*request.tokens[start : start + count], *request.drafts)
        return Work(request, start, tokens, len(request.drafts), tuple(request.pages))

    def _give(self, entry: Entry) -> None:
        """Let a running request advance as far as tokens and pages reach."""
        request = entry.request
        start = request.num_computed
        end = start + min(entry.num_wanted, self.budget)
        short = self._pool.pages_for(end) - len(request.pages)
        while short > self._pool.num_free and self._roster.running[-1] is not entry:
            self._preempt(self._roster.running[-1])
        if short > 0:
            request.pages += self._pool.allocate(min(short, self._pool.num_free))
        count = min(end, len(request.pages) * self._pool.page_size) - start
        if count > 0:
            self._counts[entry] = count
            self.budget -= count

    def _preempt(self, entry: Entry) -> None:
        self.budget += self._counts.pop(entry, 0)
        self._copies.pop(entry, None)
        self._closed_from = min(self._closed_from, entry.request.priority)
        self._roster.preempt(entry)

    def _admit(self, entry: Entry, held: list[Entry]) -> bool:
        """Let a waiting request run if it may; return whether others may be asked after it."""
        roster, request = self._roster, entry.request
        is_full = len(roster.running) + len(held) >= self._max_running
        if is_full and not self._can_turn_back_for(entry):
            return False
        found = self._pool.match(entry.chain, request.tokens) if request.reads_cache else []
        if request.reads_cache and roster.computing.is_awaited_by(entry, len(found)):
            if is_full:
                return False
            roster.waiting.remove(entry)
            held.append(entry)
            return True
        while not self._has_room(entry, found, len(held)):
            if not self._can_turn_back_for(entry):
                return False
            self._preempt(roster.running[-1])
        begun = None
        if request.reads_cache:
            begun = self._pool.beginning(entry.chain, found, request.tokens)
        num_begun = 0 if begun is None else begun.num_tokens
        roster.admit(entry, found, num_begun, self._now_s)
        if begun is not None:
            copy = PageCopy(request.pages[-1], begun.page)
            if copy.target != copy.source:  # the page was the next to be handed out
                self._pool.copied(*copy)
                self._copies[entry] = copy
        self._give(entry)
        return True

    def _can_turn_back_for(self, entry: Entry) -> bool:
        """Return whether somebody of a strictly worse priority runs."""
        running = self._roster.running
        return bool(running) and running[-1].request.priority > entry.request.priority

    def _has_room(self, entry: Entry, found: list[int], num_held: int) -> bool:
        """Return whether a request can run, and those that run already still get what they lack.

        One that is held back for a prefix keeps a place, for it will run in a moment.
        """
        roster, pool = self._roster, self._pool
        if len(roster.running) + num_held >= self._max_running:
            return False
        needed = pool.pages_for(len(entry.request.tokens)) - len(found)
        needed += sum(pool.num_users(page) == 0 for page in found)
        for other in roster.running:
            lacking = pool.pages_for(len(other.request.tokens)) - len(other.request.pages)
            needed += max(lacking, 0) + 1
        return needed <= pool.num_free
