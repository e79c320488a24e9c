"""The engine as the API sees it: answers as asynchronous iterators."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError
from deepseek.serve.audit import Auditor
from deepseek.serve.core.request import Step
from deepseek.serve.core.scheduler import Scheduler
from deepseek.serve.executor import Executor, Matcher
from deepseek.serve.generation import GenerationRequest, Grammar, Output
from deepseek.serve.loop import Delivery, EngineLoop, Ticket

if TYPE_CHECKING:
    from deepseek.serve.api.metrics import Metrics


class Service:
    """Runs an engine on its own thread for one event loop. Is a `Generator`.

    Args:
        scheduler: decides.
        executor: computes.
        tokenizer: of the model.
        vocab_size: of its logits.
        compile_grammar: gives what follows an answer of a form; called on a thread of its own.
        metrics: what the API and the engine count in; None for the API's own.
        resolve_adapter: gives the id of the adapter of a name, as `AdapterRegistry.resolve`.
        on_step: as of `EngineLoop`.
        on_death: called on the event loop if the engine dies.
        auditor: as of `EngineLoop`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        tokenizer: Tokenizer,
        vocab_size: int,
        compile_grammar: Callable[[Grammar], Matcher] | None = None,
        metrics: Metrics | None = None,
        resolve_adapter: Callable[[str], str] | None = None,
        on_step: Callable[[Step, float], None] | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self.tokenizer, self.vocab_size, self.context = tokenizer, vocab_size, executor.context
        self.metrics = metrics
        self._scheduler, self._compile = scheduler, compile_grammar
        self._resolve_adapter = resolve_adapter
        self._streams: dict[Ticket, asyncio.Queue[Output | Exception]] = {}
        self._events: asyncio.AbstractEventLoop | None = None
        self.on_death = on_death
        self.engine = EngineLoop(
            scheduler,
            executor,
            self._deliver,
            tokenizer=tokenizer,
            on_step=on_step,
            on_death=self._died,
            auditor=auditor,
        )
        self._is_open = False

    async def start(self) -> None:
        """Begin to take requests."""
        self._events = asyncio.get_running_loop()
        self.engine.start()
        self._is_open = True

    def refuse(self) -> None:
        """Say that it is not ready any more; what is under way goes on."""
        self._is_open = False

    async def stop(self, *, drains: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests, and end the engine: behind the last answer where it `drains`, but
        not later than `timeout_s`."""
        self._is_open = False
        await asyncio.to_thread(self.engine.stop, drains=drains, timeout_s=timeout_s)

    def is_ready(self) -> bool:
        """Return whether it takes requests."""
        return self._is_open and self.engine.death is None

    def retry_after_s(self) -> float:
        """Return a guess of the seconds until a request that comes now would be begun."""
        return self._scheduler.expected_wait_s()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Output]:
        """Yield the outputs of an answer as they come. Closing the iterator cancels it.

        Raises:
            ConfigError: the grammar cannot be compiled, or the adapter is not loaded.
            QueueFull: before the first output.
            DeadlineError: before the first output or between two.
            EngineError: at any time.
        """
        matcher = None
        if request.grammar is not None:
            if self._compile is None:
                raise ConfigError("This server gives no answers of a given form")
            matcher = await asyncio.to_thread(self._compile, request.grammar)
        if request.adapter is not None:
            if self._resolve_adapter is None:
                raise ConfigError("This server has no adapters")
            request = dataclasses.replace(request, adapter=self._resolve_adapter(request.adapter))
        stream: asyncio.Queue[Output | Exception] = asyncio.Queue()
        ticket = self.engine.submit(request, matcher)
        self._streams[ticket] = stream
        is_ended = False
        try:
            while not is_ended:
                given = await stream.get()
                is_ended = isinstance(given, Exception) or given.finish_reason is not None
                if isinstance(given, Exception):
                    raise given
                yield given
        finally:
            self._streams.pop(ticket, None)
            if not is_ended:
                self.engine.cancel(ticket)

    def _deliver(self, given: Sequence[Delivery]) -> None:
        self._call(self._hand_out, given)

    def _hand_out(self, given: Sequence[Delivery]) -> None:
        for ticket, output in given:
            stream = self._streams.get(ticket)
            if stream is not None:
                stream.put_nowait(output)

    def _died(self, error: BaseException) -> None:
        if self.on_death is not None:
            self._call(self.on_death, error)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        assert self._events is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._events.call_soon_threadsafe(function, *args)
