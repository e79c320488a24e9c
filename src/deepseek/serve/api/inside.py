"""Requests that the server makes of itself: chats behind responses, and lines of batches."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.types import Message, Scope

from deepseek.serve.api.chat_answers import chat_chunks, chat_completion
from deepseek.serve.api.context import set_request_id, set_tenant
from deepseek.serve.api.errors import validation_error
from deepseek.serve.api.jobs import Job, Outputs
from deepseek.serve.api.logprobs import TokenTexts
from deepseek.serve.api.routes.chat import chat_job
from deepseek.serve.api.schema.chat import ChatBody
from deepseek.serve.api.service import Service
from deepseek.serve.api.tenants import Tenant
from deepseek.serve.api.tools import ToolPlan, plan_tools

BATCH_PRIORITY = 1000
"""Of the lines of batches: everybody else goes first."""


def _new_id() -> str:
    return f"req-{secrets.token_hex(16)}"


async def chat(
    service: Service, tenant: Tenant, body: Mapping[str, Any]
) -> Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]:
    """Answer the body of a chat: a completion, or its chunks where the body says `stream`.

    Raises:
        ApiError: it is refused; with `stream`, before the first chunk.
    """
    read, plan, job = await _read(service, tenant, body)
    texts = service.texts if read.logprobs else None
    outputs = service.runner.start(job)
    await outputs.begin()
    if read.stream:
        return _chunks(job, outputs, plan, texts)
    try:
        return (await chat_completion(job, outputs, plan, texts)).model_dump(mode="json")
    finally:
        await outputs.aclose()


async def admit(service: Service, tenant: Tenant, body: Mapping[str, Any]) -> Callable[[int], None]:
    """Charge a chat that is to be answered later; return what is to be called with the tokens that
    it has used.

    Raises:
        ApiError: it would be refused.
    """
    _, _, job = await _read(service, tenant, body)
    return service.runner.admit(job).settle


async def _read(
    service: Service, tenant: Tenant, body: Mapping[str, Any]
) -> tuple[ChatBody, ToolPlan, Job]:
    try:
        read = ChatBody.model_validate(dict(body))
    except ValidationError as error:
        raise validation_error(error.errors()) from error
    plan = plan_tools(read)
    return read, plan, await chat_job(service, read, plan, tenant, _new_id())


async def _chunks(
    job: Job, outputs: Outputs, plan: ToolPlan, texts: TokenTexts | None
) -> AsyncGenerator[Mapping[str, Any]]:
    try:
        async for chunk in chat_chunks(job, outputs, plan, texts, has_usage=True):
            yield chunk
    finally:
        await outputs.aclose()


class InsideCaller:
    """Calls routes in the process, without the guards that stand before them.

    Args:
        app: with the routes alone.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Return status and body of a tenant's request to a path, at the priority of batches."""
        sent = json.dumps({**body, "priority": BATCH_PRIORITY, "stream": False}).encode()
        waiting: list[Message] = [{"type": "http.request", "body": sent, "more_body": False}]
        received: list[Message] = []

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            return await _never()

        async def send(message: Message) -> None:
            received.append(message)

        scope = _scope(url)
        set_tenant(scope, Tenant(id=tenant))
        set_request_id(scope, _new_id())
        await self._app(scope, receive, send)
        return received[0]["status"], _read_body(received[1:])


async def _never() -> Message:
    """Wait for ever: the one who asks does not go away."""
    return await asyncio.get_running_loop().create_future()


def _scope(url: str) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }


def _read_body(messages: Sequence[Message]) -> Any:
    return json.loads(b"".join(message.get("body", b"") for message in messages))
