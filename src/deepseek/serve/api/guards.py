"""What holds for every request: an id, a log line, a known host, bounded headers and body."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from functools import partial

from sse_starlette.sse import SendTimeoutError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek.serve.api.context import find_tenant, header, set_request_id
from deepseek.serve.api.errors import ApiError, api_error
from deepseek.serve.api.limits import Clock

_log = logging.getLogger(__name__)

UPLOAD_TIMEOUT_S = 600.0
"""Seconds in which the body of an upload must have come."""
SLOW_READER = "slow reader"
"""Failure of a stream whose client did not read."""
CUT_OFF = "cut off"
"""Failure of what was still under way when the server ended."""


class RequestLog:
    """The outermost layer: gives each request its id, and turns what escapes into an answer."""

    def __init__(
        self, app: ASGIApp, *, clock: Clock, on_response: Callable[[int, str | None], None]
    ) -> None:
        """Log the requests of `app`; `on_response` is told the status of each answer, and what made
        it fail."""
        self._app = app
        self._clock = clock
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; websockets are refused."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        request_id = f"req-{secrets.token_hex(16)}"
        set_request_id(scope, request_id)
        answer = _Answer(send, request_id)
        began = self._clock()
        failure: str | None = None
        try:
            await self._app(scope, receive, answer.send)
        except SendTimeoutError:
            failure = SLOW_READER  # the server closes a connection whose answer did not end
        except asyncio.CancelledError:
            failure = CUT_OFF  # nothing above has work left, and uvicorn would log a traceback
        except Exception as error:
            failure = type(error).__name__
            if not isinstance(error, ApiError):
                _log.exception(_line(request_id, scope, error=failure))
            if not answer.status:
                await api_error(error).response()(scope, receive, answer.send)
        finally:
            self._on_response(answer.status or 499, failure)
            seconds = round(self._clock() - began, 6)
            notes = {"status": answer.status or 499, "seconds": seconds, "failure": failure}
            _log.info(_line(request_id, scope, **notes))


class _Answer:
    """Puts the id on an answer, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._header = (b"x-request-id", request_id.encode())
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], self._header]}
        await self._send(message)


def _line(request_id: str, scope: Scope, **notes: object) -> str:
    """Return a log line; JSON, so that nothing in a path can begin a line of its own."""
    tenant = find_tenant(scope)
    route = {"method": scope["method"], "path": scope["path"][:200]}
    who = {"request_id": request_id, "tenant": tenant.id if tenant else None}
    return json.dumps({**who, **route, **notes})


class HostGuard:
    """Refuses requests for a host that this server is not."""

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...]) -> None:
        """Guard `app`; `*` among `hosts` lets every host through."""
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or raise ApiError."""
        if "*" not in self._hosts and _host(header(scope, "host")) not in self._hosts:
            raise ApiError(421, "This server does not answer for that host.", code="invalid_host")
        await self._app(scope, receive, send)


def _host(value: str) -> str:
    """Return the host of a Host header, without port and brackets."""
    host = value.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class SizeGuard:
    """Bounds the headers, the body, and the time that the body takes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_headers: int,
        max_header_bytes: int,
        max_body_bytes: int,
        body_timeout_s: float,
        uploads: Mapping[str, int],
    ) -> None:
        """Guard `app`; `uploads` are paths whose bodies may have more bytes, and take longer."""
        self._uploads = uploads
        self._app = app
        self._max_headers = max_headers
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or raise ApiError; the body is counted while it is read."""
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._max_headers or size > self._max_header_bytes:
            raise ApiError(431, "The request has too many or too long headers.")
        most, timeout_s = self._max_body_bytes, self._body_timeout_s
        if (upload_bytes := self._uploads.get(scope["path"])) is not None:
            most, timeout_s = upload_bytes, UPLOAD_TIMEOUT_S
        too_large = partial(_too_large, most)
        length = header(scope, "content-length")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large()
        body = _Body(receive, most, timeout_s, too_large)
        await self._app(scope, body.receive, send)


def _too_large(most: int) -> ApiError:
    text = f"The request's body is longer than {most} bytes."
    return ApiError(413, text, code="request_too_large", headers={"Connection": "close"})


class _Body:
    """A body as it comes."""

    def __init__(
        self, receive: Receive, limit: int, timeout_s: float, too_large: Callable[[], ApiError]
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._too_large = too_large
        self._size = 0
        self._is_whole = False

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            text = "The request's body did not come in time."
            headers = {"Connection": "close"}
            raise ApiError(408, text, code="body_timeout", headers=headers) from None
        self._is_whole = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        return message
