"""Responses in the background: taken in, answered a few at a time, followed, cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from deepseek.errors import DeepseekError
from deepseek.serve.api.conversation import Chat, ask, conversation
from deepseek.serve.api.errors import ApiError, api_error, bad_request
from deepseek.serve.api.event_log import Event, EventLog
from deepseek.serve.api.paging import Identified
from deepseek.serve.api.store_errors import stores_errors
from deepseek.serve.responses.answer import failed
from deepseek.serve.responses.events import queued_events, response_events
from deepseek.serve.responses.items import Item
from deepseek.serve.responses.request import ResponseRequest
from deepseek.serve.state.background import BackgroundStore, Begun, Unfinished
from deepseek.serve.state.errors import QuotaError
from deepseek.serve.state.responses import ResponseStore
from deepseek.serve.state.turns import EVERYONE, Turns

Settle = Callable[[int], None]
Admit = Callable[[Any, dict[str, Any]], Awaitable[Settle]]
"""Charges the body of a chat to whom `current_tenant` gives, and returns what is to be called with
the tokens that were used. Refuses by an ApiError."""

_LOG = logging.getLogger(__name__)
PRIORITY = 500
"""Behind those who wait for an answer, before the lines of batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundConfig:
    """How many are answered, and how long things are waited for."""

    concurrency: int = 8
    """Responses that are answered at once."""
    poll_s: float = 1.0
    """How soon one that was refused is looked at again."""
    grace_s: float = 10.0
    """How long `stop` waits for those under way; the others are answered at the next start."""
    kept_streams: int = 64
    """Streams that have ended and can still be read again."""


@dataclasses.dataclass(frozen=True)
class _Inside:
    """A tenant of whom nothing but the name is known."""

    id: str


class Background:
    """Takes responses in, and answers them until it is stopped, tenants in turn.

    Args:
        responses: keeps them.
        chat: answers; a 429 or 503 is tried again later.
        admit: charges one at its entry.
        config: by default as `BackgroundConfig`.
        clock: gives seconds, for waiting.
    """

    def __init__(
        self,
        responses: ResponseStore,
        chat: Chat,
        admit: Admit,
        config: BackgroundConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._responses, self._store = responses, BackgroundStore(responses)
        self._chat, self._admit = chat, admit
        self._config, self._clock = config or BackgroundConfig(), clock
        self._turns = Turns()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._settles: dict[str, Settle] = {}
        self._logs: dict[str, EventLog] = {}
        self._ended_logs: deque[str] = deque()
        self._wakes = asyncio.Event()
        self._is_stopping = False

    async def enter(
        self,
        tenant: Identified,
        body: ResponseRequest,
        response: dict[str, Any],
        items: Sequence[Item],
        messages: Sequence[Item],
    ) -> None:
        """Take in a response that is `queued`; from then on it survives a restart.

        Raises:
            ApiError: it is refused.
        """
        if not body.is_stored:
            raise bad_request("background needs store to be true.", "background")
        settle, name = await ask(self._admit, tenant, body, messages), response["id"]
        self._settles[name] = settle
        if body.stream:
            self._logs[name] = EventLog(queued_events(response))
        request = body.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"input"})
        try:
            with stores_errors():
                await asyncio.to_thread(self._store.enter, tenant.id, response, items, request)
        except BaseException:
            self._logs.pop(name, None)
            self._close(name, 0)
            raise
        self._wakes.set()

    def follow(self, response_id: str, after: int = -1) -> AsyncGenerator[Event]:
        """Return the events of a response behind number `after`, from one that has been asked for
        as a stream since the server began.

        Raises:
            ApiError: there are none.
        """
        log = self._logs.get(response_id)
        if log is None:
            text = "The events of this response are not kept. Read it without stream."
            raise bad_request(text, "stream")
        return log.follow(after)

    async def cancel(self, tenant: str, response_id: str) -> dict[str, Any]:
        """Cancel a response and return it; one that has ended is returned as it is.

        Raises:
            ApiError: the tenant has no such response, or it is not one in the background.
        """
        with stores_errors():
            response = await asyncio.to_thread(self._store.cancel, tenant, response_id)
        await self.drop(response_id)
        return response

    async def drop(self, response_id: str) -> None:
        """Stop answering a response that has been cancelled or deleted."""
        running = self._running.get(response_id)
        if running is not None:
            running.cancel()
            await asyncio.wait({running})
        # what one under way has used is not known: its charge stays
        self._close(response_id, None if running is not None else 0)

    async def run(self) -> None:
        """Answer until `stop` is called. Trouble with the database is logged and tried again."""
        while not self._is_stopping:
            self._wakes.clear()
            try:
                await self._begin_some()
            except DeepseekError as error:
                _LOG.error("responses wait: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wakes.wait(), self._config.poll_s)
        if self._running:
            await asyncio.wait(set(self._running.values()), timeout=self._config.grace_s)
        for running in list(self._running.values()):
            running.cancel()
        if self._running:
            await asyncio.wait(set(self._running.values()))
        for log in self._logs.values():
            log.end()

    def stop(self) -> None:
        """Begin no more; `run` returns when those under way are done or given up."""
        self._is_stopping = True
        self._wakes.set()

    async def _begin_some(self) -> None:
        unfinished = await asyncio.to_thread(self._store.unfinished)
        self._turns.keep_only({*(one.tenant for one in unfinished), EVERYONE})
        waiting = [one for one in unfinished if one.id not in self._running]
        now = self._clock()
        while len(self._running) < self._config.concurrency and not self._is_stopping:
            names = self._turns.order((one.tenant for one in waiting), now)
            if not names or not self._turns.order([EVERYONE], now):
                return
            chosen = next(one for one in waiting if one.tenant == names[0])
            waiting.remove(chosen)
            self._begin(chosen)

    def _begin(self, one: Unfinished) -> None:
        self._turns.begin(one.tenant)
        running = asyncio.create_task(self._answer(one))
        self._running[one.id] = running

        def ended(task: asyncio.Task[None]) -> None:
            del self._running[one.id]
            self._turns.end(one.tenant)
            if not task.cancelled() and (error := task.exception()):
                _LOG.error("response %s is tried again: %s", one.id, error)
                self._turns.refuse(EVERYONE, self._clock())
            else:
                self._wakes.set()

        running.add_done_callback(ended)

    async def _answer(self, one: Unfinished) -> None:
        """Answer a response, keep it, and tell its stream.

        Raises:
            Exception: it shall be tried again.
        """
        begun = await asyncio.to_thread(self._store.begin, one.id)
        if begun is None:
            return
        chunks = _Noted(await self._ask(one, begun))
        self._turns.accept(EVERYONE)

        async def save(final: dict[str, Any]) -> dict[str, Any]:
            if chunks.error is not None and _is_passing(api_error(chunks.error)):
                raise chunks.error
            return await self._keep(final)

        log = self._logs.get(one.id)
        events = response_events(begun.response, chunks.told(), save, number=2)
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if log is not None:
                        log.add(event)
        except BaseException:
            if log is not None:  # another try would tell other events
                log.end()
                del self._logs[one.id]
            raise
        self._close(one.id, None)

    async def _ask(self, one: Unfinished, begun: Begun) -> AsyncGenerator[Mapping[str, Any]]:
        """Return the chunks of an answer; where it is refused for good, the error alone.

        Raises:
            Exception: the refusal will pass.
        """
        body = ResponseRequest.model_validate({**begun.request, "input": "", "stream": True})
        try:
            previous, items = body.previous_response_id, begun.input_items
            messages = await conversation(self._responses, one.tenant, previous, items)
            answer = await ask(self._chat, _Inside(one.tenant), body, messages, priority=PRIORITY)
        except Exception as error:
            refusal = api_error(error)
            if _is_passing(refusal):
                raise
            return _refused(refusal)
        assert isinstance(answer, AsyncGenerator)
        return answer

    async def _keep(self, final: dict[str, Any]) -> dict[str, Any]:
        """Keep the end of a response, and return it as it is kept; a write that has begun is made,
        even where its task is cancelled meanwhile."""
        writing = asyncio.create_task(asyncio.to_thread(self._finish, final))
        try:
            final = await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise
        usage = final["usage"]
        self._settle(final["id"], None if usage is None else usage["total_tokens"])
        return final

    def _finish(self, final: dict[str, Any]) -> dict[str, Any]:
        try:
            self._store.finish(final["id"], final)
        except QuotaError:
            final = failed(final, [], "The answer is too large to be kept.")
            self._store.finish(final["id"], final)
        return final

    def _settle(self, response_id: str, used: int | None) -> None:
        settle = self._settles.pop(response_id, None)
        if settle is not None and used is not None:
            settle(used)

    def _close(self, response_id: str, used: int | None) -> None:
        """Settle a response that has ended, and let its stream end; of such streams only so many
        are kept."""
        self._settle(response_id, used)
        log = self._logs.get(response_id)
        if log is None:
            return
        log.end()
        if response_id not in self._ended_logs:
            self._ended_logs.append(response_id)
        while len(self._ended_logs) > self._config.kept_streams:
            self._logs.pop(self._ended_logs.popleft(), None)


class _Noted:
    """The chunks of a chat, and what broke them."""

    def __init__(self, chunks: AsyncGenerator[Mapping[str, Any]]) -> None:
        self._chunks = chunks
        self.error: Exception | None = None

    async def told(self) -> AsyncGenerator[Mapping[str, Any]]:
        async with contextlib.aclosing(self._chunks):
            try:
                async for chunk in self._chunks:
                    yield chunk
            except Exception as error:
                self.error = error
                raise


async def _refused(error: ApiError) -> AsyncGenerator[Mapping[str, Any]]:
    yield error.body


def _is_passing(error: ApiError) -> bool:
    """Return whether the same request may be answered later."""
    return error.status_code in (429, 503)
