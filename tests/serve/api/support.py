"""Talking to an application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import httpx
from fastapi import FastAPI

from deepseek.serve.api import (
    ApiSettings,
    Tenant,
    TenantLimits,
    create_app,
    hash_key,
)
from tests.serve.fakes import FakeGenerator

KEY, OTHER_KEY, ADMIN_KEY = "sk-user", "sk-other", "sk-admin"
HEADERS = {"Authorization": f"Bearer {KEY}"}
HELLO = [{"role": "user", "content": "Hi"}]


def settings(*, limits: TenantLimits | None = None, admin: bool = True, **rest: Any) -> ApiSettings:
    """Return settings with two users and an admin."""
    keys = {
        hash_key(KEY): Tenant(id="ann", limits=limits or TenantLimits()),
        hash_key(OTHER_KEY): Tenant(id="bob"),
    }
    if admin:
        keys[hash_key(ADMIN_KEY)] = Tenant(id="root", is_admin=True)
    return ApiSettings(model="tiny", keys=keys, **rest)


def make_app(generator: FakeGenerator | None = None, **rest: Any) -> FastAPI:
    """Return an application on a fake engine; `rest` as for `create_app` or `settings`."""
    names = ("on_event", "clock", "routers", "admin_routers", "adapters", "keys", "metrics")
    names += ("router",)
    given = {name: rest.pop(name) for name in names if name in rest}
    return create_app(generator or FakeGenerator(), settings=settings(**rest), **given)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, within ten seconds."""

    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


def client(app: FastAPI, **rest: Any) -> httpx.AsyncClient:
    """Return a client of an application, with a user's key."""
    given = {"headers": HEADERS, "base_url": "http://localhost"} | rest
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), **given)


def call(app: FastAPI, method: str, path: str, **rest: Any) -> httpx.Response:
    """Return the answer to one request."""

    async def ask() -> httpx.Response:
        headers = rest.pop("headers", None)
        async with client(app, **({} if headers is None else {"headers": headers})) as session:
            return await session.request(method, path, **rest)

    return run(ask())


def post(app: FastAPI, path: str, body: Any, **rest: Any) -> httpx.Response:
    """Return the answer to a JSON body."""
    return call(app, "POST", path, json=body, **rest)


def chat(app: FastAPI, **fields: Any) -> httpx.Response:
    """Return the answer to a chat."""
    return post(app, "/v1/chat/completions", {"model": "tiny", "messages": HELLO} | fields)


def events(text: str) -> list[Any]:
    """Return the data of server-sent events: JSON, and `[DONE]` as it stands."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of an answer, whose shape and status are checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "0x" not in body["error"]["message"]
    assert response.headers["x-request-id"].startswith("req-")
    return body["error"]


class Caller:
    """One request to an ASGI application, by hand: what is read and when is ours to say."""

    def __init__(
        self, app: FastAPI, body: Any, path: str = "/v1/chat/completions", **scope: Any
    ) -> None:
        self.app = app
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self.on_send: Callable[[dict[str, Any]], Awaitable[None]] | None = None
        headers = {"host": "localhost", "content-type": "application/json", **HEADERS}
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        } | scope

    async def __call__(self) -> None:
        await self.app(self.scope, self.incoming.get, self._send)

    def disconnect(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if self.on_send:
            await self.on_send(message)
