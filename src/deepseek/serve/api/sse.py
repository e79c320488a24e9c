"""Streams of server-sent events: bounded in time, with a typed error at the end where one comes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import to_json
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive, Scope, Send

from deepseek.serve.api.errors import api_error
from deepseek.serve.api.jobs import Outputs
from deepseek.serve.api.settings import ApiSettings

_log = logging.getLogger(__name__)


def let_streams_end() -> None:
    """Keep sse-starlette from cutting streams off when the server is told to stop: answers under
    way are finished."""
    AppStatus.disable_automatic_graceful_drain()


class EventStream(EventSourceResponse):
    """The answer of a streaming request. A client that goes away, or does not read, ends it."""

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any]],
        outputs: Outputs,
        settings: ApiSettings,
        request_id: str,
    ) -> None:
        """Send `chunks`, which are made from `outputs`; both are closed at the end."""
        super().__init__(
            _events(chunks, request_id),
            ping=settings.keep_alive_s,
            ping_message_factory=_keep_alive,
            send_timeout=settings.send_timeout_s,
            sep="\n",
        )
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # also where the body was never begun
            await self._outputs.aclose()


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")


async def _events(chunks: AsyncGenerator[dict[str, Any]], request_id: str) -> AsyncGenerator[bytes]:
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield b"data: " + to_json(chunk) + b"\n\n"
        yield b"data: [DONE]\n\n"
    except Exception as failure:
        error = api_error(failure)
        if error.status_code == 500:
            _log.exception(json.dumps({"request_id": request_id, "error": type(failure).__name__}))
        yield b"data: " + to_json(error.body) + b"\n\n"
