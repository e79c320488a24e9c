"""The worker that runs batches in the background: few lines at once, tenants in turn."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from deepseek.errors import DeepseekError, FormatError
from deepseek.serve.state.batch_work import ActiveBatch, BatchWork, Task
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.errors import NotFoundError
from deepseek.serve.state.turns import EVERYONE, Turns

RunLine = Callable[[str, str, Mapping[str, Any]], Awaitable[tuple[int, Any]]]
"""Answers a request of a tenant to a URL: the status of HTTP and the body, JSON-ready."""

_LOG = logging.getLogger(__name__)
_SWEEP_S = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """How the worker works."""

    concurrency: int = 2
    """Lines at the same time."""
    poll_s: float = 1.0
    """How soon a new, cancelled or expired batch is seen."""
    first_wait_s: float = 1.0
    """After a first 429 or 503; each further one doubles it."""
    longest_wait_s: float = 60.0
    grace_s: float = 10.0
    """How long `stop` waits for lines under way; those that are not done by then run again at the
    next start."""


class BatchRunner:
    """Runs the batches of a store until it is stopped. One at a time may work on a database."""

    def __init__(
        self,
        store: BatchStore,
        run_line: RunLine,
        config: RunnerConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what to run and who answers.

        Args:
            store: holds the batches.
            run_line: answers a line; a 429 (for the tenant) or 503 (for everyone) is tried again
                later, everything else is the line's answer. Cancelled where the batch is.
            config: by default as `RunnerConfig`.
            clock: gives seconds, for waiting.
        """
        self._work = BatchWork(store)
        self._run_line = run_line
        self._config = config or RunnerConfig()
        self._clock = clock
        waits = self._config.first_wait_s, self._config.longest_wait_s
        self._turns = Turns(first_wait_s=waits[0], longest_wait_s=waits[1])
        self._running: dict[asyncio.Task[None], Task] = {}
        self._stopping = asyncio.Event()
        self._swept_at = float("-inf")

    async def run(self) -> None:
        """Work until `stop` is called. Trouble with the database is logged and tried again."""
        while not self._stopping.is_set():
            began = False
            try:
                began = await self._step()
            except DeepseekError as error:
                _LOG.error("batches wait: %s", error)
                self._turns.refuse(EVERYONE, self._clock())
            if not began:
                await self._pause()
        await self._drain()

    def stop(self) -> None:
        """Begin no more lines; `run` returns when those under way are done or given up."""
        self._stopping.set()

    async def _step(self) -> bool:
        """Do what can be done now and return whether a line was begun."""
        if self._clock() - self._swept_at >= _SWEEP_S:
            await asyncio.to_thread(self._work.sweep)
            self._swept_at = self._clock()
        batches = await asyncio.to_thread(self._work.active)
        self._turns.keep_only({*(batch.tenant for batch in batches), EVERYONE})
        ready: list[ActiveBatch] = []
        for batch in batches:
            if batch.status == "validating":
                await asyncio.to_thread(self._work.validate, batch.id)
            elif batch.status == "in_progress" and not self._work.has_expired(batch):
                ready.append(batch)
            else:
                await self._give_up(batch.id)
                await asyncio.to_thread(self._work.settle, batch.id)
        if len(self._running) >= self._config.concurrency:
            return False
        return await self._begin_one(ready)

    async def _begin_one(self, batches: list[ActiveBatch]) -> bool:
        now = self._clock()
        if not self._turns.order([EVERYONE], now):
            return False
        for tenant in self._turns.order([batch.tenant for batch in batches], now):
            for batch in batches:
                if batch.tenant == tenant and (task := await self._next(batch.id)):
                    self._begin(task)
                    return True
        return False

    async def _next(self, batch_id: str) -> Task | None:
        busy = [task.line for task in self._running.values() if task.batch_id == batch_id]
        try:
            return await asyncio.to_thread(self._work.next_task, batch_id, busy)
        except (NotFoundError, FormatError) as error:
            await self._give_up(batch_id)
            await asyncio.to_thread(self._work.fail, batch_id, "invalid_file", str(error))
            return None

    def _begin(self, task: Task) -> None:
        self._turns.begin(task.tenant)
        running = asyncio.create_task(self._answer(task))
        self._running[running] = task
        running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        task = self._running.pop(running)
        self._turns.end(task.tenant)
        if not running.cancelled() and (error := running.exception()):
            # The line is still pending.
            _LOG.error("line %d of %s runs again: %s", task.line, task.batch_id, error)
            self._turns.refuse(EVERYONE, self._clock())

    async def _answer(self, task: Task) -> None:
        try:
            status_code, body = await self._run_line(task.tenant, task.url, task.body)
        except Exception:
            _LOG.exception("line %d of %s could not be answered", task.line, task.batch_id)
            message = "The server could not answer this request."
            await _finished(self._work.record_error, task, "server_error", message)
            return
        if status_code in (429, 503):
            who = task.tenant if status_code == 429 else EVERYONE
            self._turns.refuse(who, self._clock())
            return
        self._turns.accept(task.tenant)
        self._turns.accept(EVERYONE)
        await _finished(self._work.record, task, status_code, body)

    async def _give_up(self, batch_id: str) -> None:
        """Cancel the lines of a batch that are being run, and wait until they are gone."""
        mine = [running for running, task in self._running.items() if task.batch_id == batch_id]
        for running in mine:
            running.cancel()
        if mine:
            await asyncio.wait(mine)

    async def _pause(self) -> None:
        """Wait until a line is done, or for `poll_s`, or for the end."""
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait(
                {stopping, *self._running},
                timeout=self._config.poll_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            stopping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stopping

    async def _drain(self) -> None:
        if self._running:
            await asyncio.wait(set(self._running), timeout=self._config.grace_s)
        for running in list(self._running):
            running.cancel()
        if self._running:
            await asyncio.wait(set(self._running))


async def _finished(record: Callable[..., bool], *arguments: Any) -> None:
    """Run a write in a thread to its end, even where the line is cancelled meanwhile."""
    writing = asyncio.create_task(asyncio.to_thread(record, *arguments))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise
