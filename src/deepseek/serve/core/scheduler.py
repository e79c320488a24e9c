"""Decides what each step computes: one budget of tokens, no phases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from deepseek.config import Config
from deepseek.errors import CapacityError, ConfigError, VerifyError, describe
from deepseek.serve.core.cost import CostModel
from deepseek.serve.core.drafting import DraftControl, Drafter
from deepseek.serve.core.errors import DeadlineError, QueueFull
from deepseek.serve.core.forecast import Forecast
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.planning import StepPlan
from deepseek.serve.core.policy import Entry
from deepseek.serve.core.request import FinishReason, Phase, Request, Step, Work
from deepseek.serve.core.roster import Counters, Roster


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """Limits of the scheduler."""

    context: int
    """Most tokens of a prompt and its answer together; the pool must be able to hold them."""
    max_running: int = 16
    """Most requests in one step."""
    max_step_tokens: int = 512
    """Most tokens in one step; at least `max_running`."""
    max_waiting: int = 256
    """Most requests of the same or a better priority that wait while another one is taken in. A
    tenant that holds less than an equal share of these places is taken in all the same."""
    max_drafts: int = 16
    """Most guesses for one request in one step."""

    def __post_init__(self) -> None:
        smallest = {
            "context": 2,
            "max_running": 1,
            "max_step_tokens": self.max_running,
            "max_waiting": 1,
            "max_drafts": 0,
        }
        for name, least in smallest.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(describe(name, "SchedulerConfig", f"at least {least}", value))


@dataclasses.dataclass(frozen=True)
class _Planned:
    step: Step
    entries: tuple[Entry, ...]
    start_s: float


class Scheduler:
    """Holds all requests, and says which of them advance by how many tokens.

    A request wants the tokens that its pages do not hold; that covers prompts, decoding, cached
    prefixes and guesses alike. `plan` and `commit` take turns; `add` and `cancel` may come at any
    time between. Times are seconds on a clock of the caller's that never goes back.
    """

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, drafter: Drafter | None = None
    ) -> None:
        """Schedule on a pool that is all free; `drafter` guesses ahead where that pays.

        Raises:
            ConfigError: the pool cannot hold one text as long as the context.
        """
        room = pool.num_pages * pool.page_size
        if config.context > room + 1:
            must = f"at most {room + 1}, one more than the pool's pages hold"
            step = "Take more pages or a shorter context"
            raise ConfigError(describe("context", "SchedulerConfig", must, config.context, step))
        self.config = config
        self._roster = Roster(pool)
        self._forecast = Forecast(self._roster, config.max_running, config.max_step_tokens)
        self._entries: dict[str, Entry] = {}
        self._drafter = drafter
        self._control = DraftControl(self.cost, config.max_drafts)
        self._planned: _Planned | None = None
        self._dropped: list[Request] = []
        self._num_arrivals = 0
        self._next_deadline_s = math.inf

    @property
    def pool(self) -> PagePool:
        """The pages."""
        return self._roster.pool

    @property
    def cost(self) -> CostModel:
        """What steps cost, as far as they have shown it."""
        return self._forecast.cost

    @property
    def counters(self) -> Counters:
        """What has happened since the start."""
        return self._roster.counters

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests that hold pages, the best ranked first."""
        return tuple(entry.request for entry in self._roster.running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests that hold none, in no particular order."""
        return tuple(entry.request for entry in self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none."""
        return len(self._roster.waiting)

    @property
    def is_idle(self) -> bool:
        """Whether `plan` would have nothing to say."""
        return not self._entries and not self._dropped

    def add(self, request: Request, now_s: float) -> None:
        """Take in a request.

        Raises:
            ConfigError: its prompt is empty, it wants no tokens, or its id is in use.
            CapacityError: its prompt fills the context.
            QueueFull: too many wait already.
            DeadlineError: by what steps have cost so far, its deadline cannot be met.
        """
        self._check(request)
        if self._roster.waiting.is_full_for(request, self.config.max_waiting):
            must = f"at most {self.config.max_waiting}"
            message = describe("requests that wait", "the queue", must, self.num_waiting + 1)
            raise QueueFull(message, self.expected_wait_s(request.priority))
        entry = Entry(request, (request.priority, request.arrival_s, self._num_arrivals))
        if request.deadline_s is not None:
            self._check_deadline(entry, request.deadline_s, now_s)
            self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)
        self._num_arrivals += 1
        self._entries[request.id] = entry
        self._roster.enter(entry)

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> bool:
        """Finish a request early; return whether there was one to finish.

        It appears in `dropped` of the next step. While a step is under way that writes to its
        pages, it keeps them until `commit`.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.request.phase is Phase.FINISHED:
            return False
        if self._planned is not None and entry in self._planned.entries:
            entry.request.phase = Phase.FINISHED
            entry.request.finish_reason = reason
        else:
            self._leave(entry, reason)
        self._dropped.append(entry.request)
        return True

    def distrust(self, request_id: str) -> None:
        """Make what a request computed, or computed upon, unfindable by others from now on.

        `commit` and `cancel` do it for ends by `error` and `repetition`.
        """
        entry = self._entries.get(request_id)
        if entry is not None:
            self._roster.distrust(entry)

    def plan(self, now_s: float) -> Step:
        """Return the next step. It has no work only if there are no requests.

        Raises:
            VerifyError: the step before has not been committed.
        """
        if self._planned is not None:
            raise VerifyError("a step was planned before the one under way was committed")
        self._drop_late(now_s)
        config = self.config
        plan = StepPlan(self._roster, config.max_step_tokens, config.max_running, now_s)
        plan.decode()
        plan.compute_prompts()
        if self._drafter is not None:
            plan.add_drafts(self._drafter, self._control, config.context)
        work = plan.work()
        step = Step(tuple(work.values()), tuple(self._dropped), plan.copies())
        self._dropped.clear()
        if work:
            self._planned = _Planned(step, tuple(work), now_s)
        return step

    def commit(
        self,
        step: Step,
        chosen: Sequence[Sequence[int]],
        finish: Sequence[FinishReason | None],
        now_s: float,
        computed_s: float | None = None,
    ) -> tuple[Request, ...]:
        """Take what a step gave; return the requests that it finished.

        Args:
            step: what `plan` returned last; one without work needs no commit.
            chosen: for each work the tokens chosen, none unless it `is_choosing`; where it had
                guesses, those that were right and one more.
            finish: for each work why its request ends with these tokens, or None. That as many
                tokens were chosen as were asked for, or the context is full, is found here.
            now_s: time at which the step was done.
            computed_s: seconds that computing it took; None for all since it was planned.

        Raises:
            VerifyError: it is another step, or `chosen` cannot belong to it.
        """
        planned = self._planned
        if planned is None or planned.step is not step:
            if step.work or chosen or finish:
                raise VerifyError("a step was committed that is not the one under way")
            return ()
        _check_chosen(step, chosen, finish)
        self._planned = None
        took_s = now_s - planned.start_s if computed_s is None else computed_s
        self.cost.observe(step.num_tokens, took_s)
        finished: list[Request] = []
        for entry, work, tokens, reason in zip(
            planned.entries, step.work, chosen, finish, strict=True
        ):
            if entry.request.phase is Phase.FINISHED:  # cancelled while the step was under way
                self._leave(entry, entry.request.finish_reason or "cancelled")
                continue
            self._advance(entry, work, tokens)
            reason = reason or self._length_reason(entry.request)
            if reason is not None:
                self._forecast.learn(entry.request, reason, now_s)
                self._leave(entry, reason)
                finished.append(entry.request)
        return tuple(finished)

    def expected_wait_s(self, priority: int = 0) -> float:
        """Return a guess of the seconds until a request that comes now would be begun."""
        return self._forecast.wait_s(priority)

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise ConfigError(describe("prompt", "Request", "at least one token", request.prompt))
        if request.max_tokens < 1:
            raise ConfigError(describe("max_tokens", "Request", "at least 1", request.max_tokens))
        if request.id in self._entries or request.phase is not Phase.WAITING:
            raise ConfigError(describe("id", "Request", "that of no other request", request.id))
        if len(request.prompt) >= self.config.context:
            must = f"less than the context of {self.config.context} tokens"
            raise CapacityError(
                describe("prompt length", "Request", must, len(request.prompt), "Shorten it")
            )

    def _check_deadline(self, entry: Entry, deadline_s: float, now_s: float) -> None:
        left_s = deadline_s - now_s
        needed_s = self._forecast.answer_s(entry)
        if left_s <= needed_s:
            must = f"more than the {needed_s:.3f} s that it is expected to take"
            step = "Allow more time, ask for fewer tokens, or come back later"
            raise DeadlineError(describe("time left", "Request", must, round(left_s, 3), step))

    def _drop_late(self, now_s: float) -> None:
        if now_s < self._next_deadline_s:
            return
        self._next_deadline_s = math.inf
        for entry in tuple(self._entries.values()):
            deadline_s = entry.request.deadline_s
            if deadline_s is None:
                continue
            if deadline_s <= now_s:
                self._forecast.learn(entry.request, "deadline", now_s)
                self._leave(entry, "deadline")
                self._dropped.append(entry.request)
            else:
                self._next_deadline_s = min(self._next_deadline_s, deadline_s)

    def _advance(self, entry: Entry, work: Work, tokens: Sequence[int]) -> None:
        request = entry.request
        num_accepted = max(len(tokens) - 1, 0)
        request.num_computed = work.start + len(work.tokens) - work.num_drafts + num_accepted
        request.tokens.extend(tokens)
        request.drafts = []
        self._roster.share.charge(entry.tenant, len(tokens))
        if work.num_drafts:
            self._control.observe(request, work.num_drafts, num_accepted)
            self.counters.drafted_tokens += work.num_drafts
            self.counters.accepted_tokens += num_accepted
            self._give_back_spare(request)
        self._roster.publish(entry)

    def _give_back_spare(self, request: Request) -> None:
        """Release the pages that only wrong guesses needed."""
        needed = self.pool.pages_for(len(request.tokens))
        self.pool.release(request.pages[needed:])
        del request.pages[needed:]

    def _length_reason(self, request: Request) -> FinishReason | None:
        is_full = len(request.tokens) >= self.config.context
        return "length" if is_full or request.num_chosen >= request.max_tokens else None

    def _leave(self, entry: Entry, reason: FinishReason) -> None:
        self._roster.leave(entry, reason)
        del self._entries[entry.request.id]
        self._control.close(entry.request)
        if self._drafter is not None:
            self._drafter.close(entry.request)


def _check_chosen(
    step: Step, chosen: Sequence[Sequence[int]], finish: Sequence[FinishReason | None]
) -> None:
    """Raise if what was chosen cannot belong to a step."""
    if not len(step.work) == len(chosen) == len(finish):
        raise VerifyError(
            f"{len(step.work)} works were given {len(chosen)} answers and {len(finish)} ends"
        )
    for work, tokens, reason in zip(step.work, chosen, finish, strict=True):
        if work.request.phase is Phase.FINISHED:
            continue
        most = work.num_drafts + 1 if work.is_choosing else 0
        if len(tokens) > most or (work.is_choosing and not tokens and reason is None):
            raise VerifyError(
                f"request {work.request.id} was given {len(tokens)} tokens where at most {most} "
                "can be chosen"
            )
        guesses = work.tokens[len(work.tokens) - work.num_drafts :]
        if tuple(tokens[:-1]) != guesses[: max(len(tokens) - 1, 0)]:
            raise VerifyError(f"request {work.request.id} was given tokens behind a wrong guess")
