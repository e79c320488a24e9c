"""The scheduler on the executor without a model, with every invariant checked at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from deepseek.serve.core import ledger
from deepseek.serve.core.chain import PageHash, page_hash
from deepseek.serve.core.drafting import Drafter
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.request import FinishReason, Phase, Request, Step
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.generation import GenerationRequest
from deepseek.serve.sim import Language, SimExecutor, VirtualClock, hashed_language

VOCAB_SIZE = 50

End = Callable[[Request, Sequence[int]], FinishReason | None]


class Simulation:
    """Takes requests and steps; all time is virtual."""

    def __init__(
        self,
        *,
        num_pages: int = 16,
        page_size: int = 4,
        drafter: Drafter | None = None,
        language: Language | None = None,
        hash_: PageHash = page_hash,
        is_checked: bool = True,
        copies: bool = True,
        **limits: int,
    ) -> None:
        given = {"context": 40, "max_running": 4, "max_step_tokens": 16, **limits}
        self.config = SchedulerConfig(**given)
        self.clock = VirtualClock()
        self.language = language or hashed_language(VOCAB_SIZE)
        self.pool = PagePool(num_pages, page_size, hash_, least_copied=1 if copies else None)
        self.scheduler = Scheduler(self.config, self.pool, drafter)
        self.executor = SimExecutor(
            num_pages=num_pages,
            page_size=page_size,
            max_step_tokens=self.config.max_step_tokens,
            context=self.config.context,
            vocab_size=VOCAB_SIZE,
            language=self.language,
            spend=self.clock.advance,
        )
        self.is_checked = is_checked
        self.steps: list[Step] = []
        self._num_added = 0

    def add(self, prompt: Iterable[int], max_tokens: int = 8, **fields: object) -> Request:
        """Add a request that comes now."""
        name = fields.pop("id", None) or f"r{self._num_added}"
        request = Request(
            id=str(name),
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            arrival_s=self.clock.now_s,
            **fields,  # pyright: ignore[reportArgumentType]
        )
        self.scheduler.add(request, self.clock.now_s)
        wanted = GenerationRequest(prompt=request.prompt, max_tokens=max_tokens)
        self.executor.open(request.id, wanted)
        self._num_added += 1
        return request

    def plan(self) -> Step:
        """Plan a step and check what must hold between the two states."""
        before = set(self.scheduler.running)
        step = self.scheduler.plan(self.clock.now_s)
        for request in step.dropped:
            self.executor.close(request.id)
        if self.is_checked:
            ledger.check(self.scheduler)
            assert step.num_tokens <= self.config.max_step_tokens
            assert len(step.work) <= self.config.max_running
            assert bool(step.work) == bool(self.scheduler.num_running + self.scheduler.num_waiting)
            self._check_preempted(step, before)
            self._check_copies(step)
        return step

    def commit(self, step: Step, end: End | None = None) -> tuple[Request, ...]:
        """Execute a planned step, and say how its requests end."""
        if not step.work:
            return ()
        results = self.executor.execute(step.work, step.copies)
        chosen = [[choice.token_id for choice in result.tokens] for result in results]
        reasons = [
            end(work.request, tokens) if end else None
            for work, tokens in zip(step.work, chosen, strict=True)
        ]
        finished = self.scheduler.commit(step, chosen, reasons, self.clock.now_s)
        for request in finished:
            self.executor.close(request.id)
        if self.is_checked:
            ledger.check(self.scheduler)
            for request, tokens in zip((work.request for work in step.work), chosen, strict=True):
                if request.phase is Phase.RUNNING:
                    assert len(request.pages) <= self.pool.pages_for(len(request.tokens))
                    assert not tokens or request.num_computed == len(request.tokens) - 1
        return finished

    def step(self, end: End | None = None) -> Step:
        """Plan, execute, commit."""
        step = self.plan()
        self.commit(step, end)
        self.steps.append(step)
        return step

    def run(self, most_steps: int = 1000) -> None:
        """Step until nothing is left."""
        for _ in range(most_steps):
            if self.scheduler.is_idle:
                return
            self.step()
        raise AssertionError(f"not done after {most_steps} steps")

    def alone(self, request: Request) -> list[int]:
        """Return the text that a request gets on an empty machine."""
        text = list(request.prompt)
        most = min(len(text) + request.max_tokens, self.config.context)
        while len(text) < most:
            text.append(self.language(text))
        return text

    def assert_answered(self, request: Request) -> None:
        """A finished request has the text that it would have had alone, whole or cut short."""
        assert request.phase is Phase.FINISHED
        text = self.alone(request)
        if request.finish_reason == "length":
            assert request.tokens == text
        else:
            assert request.tokens == text[: len(request.tokens)]

    def assert_nothing_held(self) -> None:
        """No page, no request and no note of one is left."""
        ledger.check(self.scheduler)
        assert self.pool.num_free == self.pool.num_pages
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.executor.num_open == 0

    def _check_copies(self, step: Step) -> None:
        """Each is the first page that a request of this step writes, and of no other."""
        written = {work.pages[work.start // self.pool.page_size] for work in step.work}
        targets = [copy.target for copy in step.copies]
        assert len(set(targets)) == len(targets)
        assert set(targets) <= written

    def _check_preempted(self, step: Step, before: set[Request]) -> None:
        turned_back = [request for request in before if request.phase is Phase.WAITING]
        for loser in turned_back:
            for work in step.work:
                assert work.num_drafts == 0
                winner = work.request
                assert (winner.priority, winner.arrival_s) <= (loser.priority, loser.arrival_s)
