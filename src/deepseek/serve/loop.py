"""The engine's own thread: take what came in, decide a step, run it, hand out what it gave."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from deepseek.data import Tokenizer
from deepseek.errors import DeepseekError
from deepseek.serve.answer import Answer
from deepseek.serve.audit import NUM_TOP, Auditor
from deepseek.serve.core.request import FinishReason, Request, Step, Work
from deepseek.serve.core.scheduler import Scheduler
from deepseek.serve.executor import Executor, Matcher, Result
from deepseek.serve.generation import (
    DeadlineError,
    EngineError,
    GenerationRequest,
    Output,
    TokenChoice,
)

T = TypeVar("T")

LOG = logging.getLogger("deepseek.serve")

Delivery = tuple["Ticket", "Output | Exception"]
Deliver = Callable[[Sequence[Delivery]], None]
"""Called on the engine's thread with all that a step gave; must not block."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request that was handed in."""

    id: str
    generation: GenerationRequest
    matcher: Matcher | None
    arrival_s: float
    answer: Answer | None = None
    request: Request | None = None
    is_ended: bool = False
    audited: list[TokenChoice] | None = None
    """Its tokens so far, where it will be audited."""


class EngineLoop:
    """Runs requests until it is told to stop, or an error ends it.

    `submit` and `cancel` may be called from any thread; all else happens on the engine's own.

    Args:
        scheduler: decides.
        executor: computes.
        deliver: gets what every step gives.
        tokenizer: of the model; None for ids alone.
        clock: seconds, rising.
        on_step: called behind every step with it and the seconds it took.
        on_death: called once if an error ends the loop.
        auditor: reads some answers again while nothing else is to be done.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        deliver: Deliver,
        *,
        tokenizer: Tokenizer | None,
        clock: Callable[[], float] = time.monotonic,
        on_step: Callable[[Step, float], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self._auditor = auditor
        self.scheduler, self.executor = scheduler, executor
        self._deliver, self._tokenizer, self._clock = deliver, tokenizer, clock
        self._on_step, self._on_death = on_step, on_death
        self._numbers = itertools.count()
        self._incoming: deque[tuple[str, Ticket]] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wakes = threading.Condition()
        self._under_way: dict[str, Ticket] = {}
        self._is_stopping = self._is_draining = self._audits = False
        self.death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    def stop(self, *, drains: bool, timeout_s: float | None = None) -> None:
        """End the thread: behind the last answer, or at once, when what is under way gets an
        `EngineError`."""
        if self._thread.ident is None:
            return
        with self._wakes:
            self._is_draining, self._is_stopping = True, self._is_stopping or not drains
            self._wakes.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.abort()
            self._thread.join()

    def abort(self) -> None:
        """End the thread behind the step that runs; what is under way gets an `EngineError`."""
        with self._wakes:
            self._is_draining = self._is_stopping = True
            self._wakes.notify()

    @property
    def cause_of_death(self) -> BaseException | None:
        """The error that ended the engine; None while it runs, and where it was told to end."""
        return None if isinstance(self.death, EngineError) else self.death

    def submit(self, generation: GenerationRequest, matcher: Matcher | None = None) -> Ticket:
        """Hand in a request; what becomes of it comes by `deliver`.

        Raises:
            EngineError: the engine is not running any more.
        """
        ticket = Ticket(f"r{next(self._numbers)}", generation, matcher, self._clock())
        with self._wakes:
            if self.death is not None or self._is_draining:
                raise EngineError("The engine is not running any more. Try another server")
            self._incoming.append(("submit", ticket))
            self._wakes.notify()
        return ticket

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine's thread between two steps; what it does must be short.

        The future gets an `EngineError` where the engine ends before.

        Raises:
            EngineError: the engine is not running any more.
        """
        future: Future[T] = Future()
        with self._wakes:
            if self.death is not None or self._is_draining:
                raise EngineError("The engine is not running any more. Try another server")
            self._calls.append((function, future))
            self._wakes.notify()
        return future

    def cancel(self, ticket: Ticket) -> None:
        """Say that nobody waits for a request any more; nothing more is delivered for it."""
        with self._wakes:
            self._incoming.append(("cancel", ticket))
            self._wakes.notify()

    def _run(self) -> None:
        try:
            while self._waits_for_work():
                self.advance()
        except BaseException as error:
            LOG.exception("the engine died")
            self._die(error)
            return
        self._die(EngineError("The server is shutting down"))

    def _waits_for_work(self) -> bool:
        """Wait until there is something to do; return False when the loop shall end."""
        with self._wakes:
            while not self._is_stopping:
                if self._incoming or self._under_way or self._calls:
                    return True
                if self._is_draining:
                    return False
                if self._audits:
                    break
                self._wakes.wait()
        return not self._is_stopping

    def _die(self, error: BaseException) -> None:
        with self._wakes:
            self.death = error
            tickets = [ticket for kind, ticket in self._incoming if kind == "submit"]
            self._incoming.clear()
            calls, self._calls = self._calls, deque()
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError("The engine ended"))
        tickets += self._under_way.values()
        self._under_way.clear()
        told = error if isinstance(error, EngineError) else EngineError("The engine died")
        self._deliver([(ticket, told) for ticket in tickets if not ticket.is_ended])
        if self._on_death is not None and not isinstance(error, EngineError):
            self._on_death(error)

    def advance(self) -> None:
        """Take what came in and run one step; with nothing to do, a part of an audit."""
        given = self._take_incoming()
        self._call_next()
        if self._auditor is not None and not self._under_way:
            self._audits = self._auditor.advance()
        start_s = self._clock()
        step = self.scheduler.plan(start_s)
        given += [
            (self._end(request), DeadlineError("The deadline has passed"))
            for request in step.dropped
            if request.finish_reason == "deadline"
        ]
        if step.work:
            planned_s = self._clock()
            results = self.executor.execute(step.work, step.copies)
            end_s = self._clock()
            given += self._commit(step, results, end_s, end_s - planned_s)
            if self._on_step is not None:
                self._on_step(step, end_s - start_s)
        if given:
            self._deliver(given)

    def _call_next(self) -> None:
        """Run the oldest call, one between two steps."""
        with self._wakes:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    def _take_incoming(self) -> list[Delivery]:
        with self._wakes:
            incoming, self._incoming = self._incoming, deque()
        given: list[Delivery] = []
        for kind, ticket in incoming:
            if kind == "cancel":
                self._drop(ticket)
            elif not ticket.is_ended:
                try:
                    self._admit(ticket)
                except DeepseekError as error:
                    ticket.is_ended = True
                    given.append((ticket, error))
        return given

    def _admit(self, ticket: Ticket) -> None:
        wanted, now_s = ticket.generation, self._clock()
        deadline_s = None if wanted.deadline_s is None else ticket.arrival_s + wanted.deadline_s
        ticket.request = Request(
            id=ticket.id,
            prompt=wanted.prompt,
            max_tokens=wanted.max_tokens,
            tenant=wanted.tenant,
            adapter=wanted.adapter,
            priority=wanted.priority,
            arrival_s=ticket.arrival_s,
            deadline_s=deadline_s,
            reads_cache=wanted.prompt_logprobs is None,
        )
        self.scheduler.add(ticket.request, now_s)
        if self._auditor is not None and self._auditor.wants_next():
            ticket.audited = []
            wanted = dataclasses.replace(wanted, logprobs=max(wanted.logprobs or 0, NUM_TOP))
        ticket.answer = Answer(wanted, self._tokenizer, self.executor.context, ticket.matcher)
        try:
            self.executor.open(ticket.id, wanted, ticket.matcher)
        except DeepseekError:
            self.scheduler.cancel(ticket.id)
            raise
        self._under_way[ticket.id] = ticket

    def _drop(self, ticket: Ticket) -> None:
        ticket.is_ended = True
        if self._under_way.pop(ticket.id, None) is not None:
            self.scheduler.cancel(ticket.id)
            self.executor.close(ticket.id)

    def _end(self, request: Request) -> Ticket:
        ticket = self._under_way.pop(request.id)
        ticket.is_ended = True
        self.executor.close(request.id)
        return ticket

    def _commit(
        self, step: Step, results: Sequence[Result], now_s: float, computed_s: float
    ) -> list[Delivery]:
        given: list[Delivery] = []
        chosen: list[list[int]] = []
        reasons: list[FinishReason | None] = []
        for work, result in zip(step.work, results, strict=True):
            output = self._output(work, result)
            chosen.append([choice.token_id for choice in output.tokens])
            reasons.append(output.finish_reason)
            if output.tokens or output.finish_reason or output.prompt_logprobs:
                given.append((self._under_way[work.request.id], output))
        self.scheduler.commit(step, chosen, reasons, now_s, computed_s)
        for work, reason in zip(step.work, reasons, strict=True):
            if reason is not None:
                self._end(work.request)
        return given

    def _output(self, work: Work, result: Result) -> Output:
        request, ticket = work.request, self._under_way[work.request.id]
        answer = ticket.answer
        assert answer is not None
        output = answer.take(result.tokens)
        if ticket.audited is not None:
            output = self._keep_for_audit(ticket, output)
        if output.finish_reason is None and (result.error is not None or not result.is_finite):
            output = dataclasses.replace(output, finish_reason="error")
        prompt: tuple[TokenChoice, ...] | None = None
        if ticket.generation.prompt_logprobs is not None and work.is_choosing:
            first = TokenChoice(request.prompt[0])
            prompt = (first, *result.prompt) if request.num_chosen == 0 else None
        return dataclasses.replace(
            output, num_cached_tokens=request.num_cached, prompt_logprobs=prompt
        )

    def _keep_for_audit(self, ticket: Ticket, output: Output) -> Output:
        """Return an output as it was asked for, and keep it with all its logprobs."""
        assert ticket.audited is not None and self._auditor is not None
        ticket.audited += output.tokens
        if output.finish_reason in ("stop", "length"):
            asked = ticket.generation
            self._auditor.take(asked.prompt, ticket.audited, asked.adapter)
            self._audits = True
        num_top = ticket.generation.logprobs or 0
        shown = (dataclasses.replace(each, top=each.top[:num_top]) for each in output.tokens)
        return dataclasses.replace(output, tokens=tuple(shown))
