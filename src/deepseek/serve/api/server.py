"""The application behind a socket: uvicorn with the limits that only it can hold."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek.serve.api.settings import ApiSettings


def make_server(
    app: ASGIApp,
    settings: ApiSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_connections: int = 1024,
) -> uvicorn.Server:
    """Return a server, not started yet.

    Args:
        app: from `create_app`.
        settings: as the app's.
        host: address to listen on; loopback unless told otherwise.
        port: 0 for any free one.
        max_connections: more are answered with 503.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_protocol(settings.header_timeout_s),
        ws="none",
        h11_max_incomplete_event_size=settings.max_header_bytes,
        limit_concurrency=max_connections,
        timeout_keep_alive=5,
        server_header=False,
        access_log=False,
        log_config=None,
        proxy_headers=False,
    )
    return uvicorn.Server(config)


def _protocol(timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with a bound on the time that a request's headers take, which
    uvicorn does not have: without one, idle connections are kept for ever."""

    class BoundedProtocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(timeout_s, self._give_up)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if self.conn.their_state is h11.IDLE:
                self.transport.close()

    return BoundedProtocol
