"""A real server on loopback over real stores, with a chat that says what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header

from deepseek.serve.api.app import add_error_handlers
from deepseek.serve.api.errors import ApiError
from deepseek.serve.running import Worker


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Whoever asks."""

    id: str


def current_tenant(authorization: str = Header("")) -> Tenant:
    """Take the key itself as the tenant."""
    if not authorization.startswith("Bearer ") or authorization == "Bearer wrong":
        raise ApiError(401, "Unknown key.", code="invalid_api_key")
    return Tenant(authorization.removeprefix("Bearer "))


def app_of(*routers: APIRouter) -> FastAPI:
    """Return an app with these routes."""
    app = FastAPI()
    add_error_handlers(app)
    for router in routers:
        app.include_router(router)
    return app


tenant_dependency = Depends(current_tenant)


@contextlib.contextmanager
def served(app: FastAPI, *workers: Worker) -> Iterator[str]:
    """Serve an app on loopback in a thread, with workers beside, and yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)

    async def work() -> None:
        working = [asyncio.create_task(worker.run()) for worker in workers]
        await server.serve([listener])
        for worker in workers:
            worker.stop()
        await asyncio.gather(*working)

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@dataclasses.dataclass
class FakeChat:
    """Answers with a message, and remembers what it was asked."""

    message: dict[str, Any] = dataclasses.field(default_factory=lambda: {"content": "Hello!"})
    finish_reason: str = "stop"
    most_messages: int = 100
    error: Exception | None = None
    """Raised after the first chunk of a stream."""
    logprobs: list[dict[str, Any]] | None = None
    refusals: list[ApiError] = dataclasses.field(default_factory=list)
    """Raised one by one before it answers."""
    is_held: bool = False
    """Whether a stream waits behind each chunk."""
    asked: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tenants: list[str] = dataclasses.field(default_factory=list)
    closed: int = 0

    async def __call__(self, tenant: Tenant, body: dict[str, Any]) -> Any:
        """Answer as the chat route would."""
        self.asked.append(body)
        self.tenants.append(tenant.id)
        if len(body["messages"]) > self.most_messages:
            raise ApiError(400, "Too long.", code="context_length_exceeded")
        if self.refusals:
            raise self.refusals.pop(0)
        if body.get("stream"):
            return self._chunks()
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", **self.message},
            "finish_reason": self.finish_reason,
            "logprobs": self.logprobs and {"content": self.logprobs},
        }
        return {"model": "small", "choices": [choice], "usage": USAGE}

    async def _chunks(self) -> AsyncGenerator[Mapping[str, Any]]:
        try:
            yield _chunk({"role": "assistant", "content": ""})
            for word in (self.message.get("content") or "").split(" ") if self.message else ():
                yield _chunk({"content": word}, logprobs=self.logprobs)
                await asyncio.sleep(0)
                while self.is_held:
                    await asyncio.sleep(0.005)
                if self.error:
                    raise self.error
            for index, call in enumerate(self.message.get("tool_calls") or ()):
                made = call["function"]
                head = {"name": made["name"], "arguments": ""}
                yield _call_chunk({"index": index, "id": call["id"], "function": head})
                for letter in made["arguments"]:
                    yield _call_chunk({"index": index, "function": {"arguments": letter}})
            yield _chunk({}, self.finish_reason)
            yield {"model": "small", "choices": [], "usage": USAGE}
        finally:
            self.closed += 1


USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def _chunk(delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> Any:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {
        "model": "small",
        "choices": [{**choice, "logprobs": logprobs and {"content": logprobs}}],
    }


def _call_chunk(call: dict[str, Any]) -> Any:
    return _chunk({"tool_calls": [call]})
