"""Whatever comes in whatever order: no page is lost, nobody starves, every answer is right."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deepseek.serve.core.chain import page_hash
from deepseek.serve.core.drafting import PromptLookup
from deepseek.serve.core.errors import DeadlineError, QueueFull
from deepseek.serve.core.request import FinishReason, Phase, Request, Step
from tests.serve.core.simulation import Simulation

PREFIXES = [(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 9, 9, 9, 9)]


def periodic(tokens: object) -> int:
    """A language that goes round in circles, so that guesses are often right and not always."""
    text = list(tokens)  # pyright: ignore[reportArgumentType]
    return (text[-1] + 1) % 5 if len(text) % 7 else len(text) % 50


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, cancels, plans, commits and finishes requests in any order."""

    sim: Simulation
    planned: Step | None
    requests: list[Request]

    @initialize(
        num_pages=st.integers(4, 14),
        page_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 5),
        budget=st.integers(0, 12),
        has_drafts=st.booleans(),
        is_colliding=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_running: int,
        budget: int,
        has_drafts: bool,
        is_colliding: bool,
    ) -> None:
        self.sim = Simulation(
            num_pages=num_pages,
            page_size=page_size,
            context=min(num_pages * page_size + 1, 30),
            max_running=max_running,
            max_step_tokens=max_running + budget,
            max_waiting=8,
            drafter=PromptLookup() if has_drafts else None,
            language=periodic if has_drafts else None,
            hash_=(lambda before, content: b"same") if is_colliding else page_hash,
        )
        self.planned = None
        self.requests = []

    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.integers(0, 3), max_size=6),
        max_tokens=st.integers(1, 16),
        tenant=st.sampled_from(["ann", "bob"]),
        adapter=st.sampled_from([None, "lora"]),
        priority=st.integers(0, 2),
        wait_s=st.sampled_from([None, None, None, 5.0, 0.05, 0.0]),
        uses_cache=st.sampled_from([(True, True), (True, True), (True, False), (False, True)]),
        count=st.integers(1, 4),
    )
    def add(
        self,
        prefix: tuple[int, ...],
        rest: list[int],
        max_tokens: int,
        tenant: str,
        adapter: str | None,
        priority: int,
        wait_s: float | None,
        uses_cache: tuple[bool, bool],
        count: int,
    ) -> None:
        for place in range(count):
            try:
                request = self.sim.add(
                    self.fitting((*prefix, *rest, place)),
                    max_tokens,
                    tenant=tenant,
                    adapter=adapter,
                    priority=priority,
                    deadline_s=None if wait_s is None else self.sim.clock.now_s + wait_s,
                    reads_cache=uses_cache[0],
                    writes_cache=uses_cache[1],
                )
            except QueueFull as error:
                assert error.retry_after_s > 0
                return
            except DeadlineError:
                assert wait_s is not None
                return
            self.requests.append(request)

    def fitting(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """Return the part of a prompt that fits."""
        return prompt[: self.sim.config.context - 1]

    @precondition(lambda self: self.planned is None)
    @rule()
    def plan(self) -> None:
        self.planned = self.sim.plan()

    @precondition(lambda self: self.planned is not None)
    @rule(ends=st.lists(st.sampled_from([None, None, None, "stop", "error", "repetition"])))
    def commit(self, ends: list[FinishReason | None]) -> None:
        assert self.planned is not None
        places = {work.request: place for place, work in enumerate(self.planned.work)}

        def end(request: Request, tokens: object) -> FinishReason | None:
            place = places[request]
            return ends[place] if tokens and place < len(ends) else None

        self.sim.commit(self.planned, end)
        self.planned = None

    @precondition(lambda self: self.planned is None)
    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.sim.step()

    @rule(place=st.integers(0, 30), reason=st.sampled_from(["cancelled", "error"]))
    def cancel(self, place: int, reason: FinishReason) -> None:
        if place >= len(self.requests):
            assert not self.sim.scheduler.cancel("unknown", reason)
            return
        request = self.requests[place]
        was_there = request.phase is not Phase.FINISHED
        assert self.sim.scheduler.cancel(request.id, reason) == was_there
        assert not self.sim.scheduler.cancel(request.id, reason)

    @rule(seconds=st.sampled_from([0.01, 0.2, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.sim.clock.advance(seconds)

    def teardown(self) -> None:
        if not hasattr(self, "planned"):
            return
        if self.planned is not None:
            self.sim.commit(self.planned)
        # A step computes at least one token; a preempted text is computed again, at most once for
        # every token that a better one advances by.
        tokens = sum(len(request.prompt) + request.max_tokens for request in self.requests)
        self.sim.run(most_steps=20 + 4 * tokens)
        self.sim.assert_nothing_held()
        assert len(self.sim.scheduler._roster.computing) == 0
        for request in self.requests:
            self.sim.assert_answered(request)
            if request.finish_reason == "deadline":
                assert request.deadline_s is not None
                assert request.deadline_s <= self.sim.clock.now_s


def test_any_order_of_events() -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
def test_any_order_of_events_for_long() -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=100,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
