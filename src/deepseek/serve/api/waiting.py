"""Waiting for an answer only as long as its client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, Generic, TypeVar

import anyio
from fastapi import Request

from deepseek.serve.api.errors import ApiError

T = TypeVar("T")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; when the client goes away, cancel it.

    Raises:
        ApiError: 499, which nobody reads: the client is gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client went away.", code="client_closed_request")
        return task.result()
    finally:
        await _cancel(task, gone)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    with anyio.CancelScope(shield=True):
        await asyncio.gather(*tasks, return_exceptions=True)


class BegunStream(Generic[T]):
    """A stream whose first item has been asked for already, so that an error before it still finds
    an answer without a status."""

    def __init__(self, source: AsyncGenerator[T]) -> None:
        """Ask `source` for its first item; it is closed with this stream."""
        self._source = source
        self._first = asyncio.ensure_future(self._take_first())
        self._has_given_first = False

    async def begin(self) -> None:
        """Wait for the first item.

        Raises:
            Exception: what the source raised before it.
        """
        try:
            await self._first
        except BaseException:
            await self.aclose()
            raise

    async def wait(self, request: Request, timeout_s: float) -> None:
        """Wait for the first item, but no longer than `timeout_s`.

        Raises:
            Exception: what the source raised before its first item.
            ApiError: 499: the client is gone.
        """
        try:
            await until_disconnect(request, self._wait_first(timeout_s))
            if self._first.done():
                self._first.result()
        except BaseException:
            await self.aclose()
            raise

    async def _take_first(self) -> list[T]:
        async for item in self._source:
            return [item]
        return []

    async def _wait_first(self, timeout_s: float) -> None:
        await asyncio.wait({self._first}, timeout=timeout_s)

    def __aiter__(self) -> AsyncIterator[T]:
        """Return itself."""
        return self

    async def __anext__(self) -> T:
        """Return the next item."""
        if not self._has_given_first:
            self._has_given_first = True
            for item in await self._first:
                return item
        return await anext(self._source)

    async def aclose(self) -> None:
        """Close the source, begun or not."""
        await _cancel(self._first)
        with anyio.CancelScope(shield=True):
            await self._source.aclose()


async def fan_in(sources: list[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Yield the items of several sources as they come, each with its source's number.

    The sources run at once; the items that nobody has taken yet are bounded. The first error ends
    all.
    """
    queue: asyncio.Queue[tuple[int, list[T] | Exception | None]] = asyncio.Queue(len(sources))

    async def drain(number: int, source: AsyncGenerator[T]) -> None:
        try:
            async for item in source:
                await queue.put((number, [item]))
        except Exception as error:
            await queue.put((number, error))
        else:
            await queue.put((number, None))

    tasks = [asyncio.ensure_future(drain(number, item)) for number, item in enumerate(sources)]
    try:
        left = len(sources)
        while left:
            number, found = await queue.get()
            if found is None:
                left -= 1
            elif isinstance(found, Exception):
                raise found
            else:
                yield number, found[0]
    finally:
        await _cancel(*tasks)
        with anyio.CancelScope(shield=True):
            for source in sources:
                await source.aclose()
