"""What the routers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Coroutine
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from deepseek.serve.api.jobs import Job, Outputs, Runner
from deepseek.serve.api.logprobs import TokenTexts
from deepseek.serve.api.metrics import Metrics
from deepseek.serve.api.reading import Reader
from deepseek.serve.api.settings import ApiSettings
from deepseek.serve.api.waiting import until_disconnect
from deepseek.serve.generation import Generator

_EVENT_SCHEMA = {
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
STREAM_RESPONSE = {"content": {"text/event-stream": {"itemSchema": _EVENT_SCHEMA}}}
"""For the OpenAPI document of a route that can stream: each event has a chunk, an error or `[DONE]`
as its data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """The parts of a server that a router is made with."""

    generator: Generator
    settings: ApiSettings
    reader: Reader
    runner: Runner
    metrics: Metrics
    texts: TokenTexts
    started: int
    """Unix time in seconds."""

    def without_limits(self) -> Service:
        """Return the same for requests that the server makes of itself, which charge nobody."""
        return dataclasses.replace(self, runner=self.runner.without_limits())

    async def begin(self, request: Request, job: Job) -> Outputs:
        """Begin a job, and wait for its first output or until the stream should be opened.

        Raises:
            ApiError: it is not admitted, failed before its first output, or the client has gone.
        """
        outputs = self.runner.start(job)
        await outputs.wait(request, self.settings.keep_alive_s)
        return outputs


def as_json(answer: BaseModel) -> Response:
    """Return an answer as JSON, as it stands."""
    return Response(answer.model_dump_json(), media_type="application/json")


async def whole(
    request: Request, outputs: Outputs, answer: Coroutine[Any, Any, BaseModel]
) -> Response:
    """Return an answer that is made from `outputs`, unless the client goes away before.

    Args:
        request: whose client waits.
        outputs: closed at the end.
        answer: makes it.
    """
    try:
        return as_json(await until_disconnect(request, answer))
    finally:
        await outputs.aclose()
