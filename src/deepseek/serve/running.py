"""A server from its start to its end: signals, draining, and an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import uvicorn

from deepseek.serve.service import Service

ABORT_S = 1.0
"""In which clients get the error of what a second signal ended, before connections are cut."""


class Worker(Protocol):
    """Works beside what clients wait for."""

    async def run(self) -> None:
        """Work until `stop` is called, and end what is under way."""
        ...

    def stop(self) -> None:
        """Begin nothing more."""
        ...


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


async def run_server(
    config: uvicorn.Config,
    service: Service,
    *,
    drain_s: float,
    workers: Sequence[Worker] = (),
    on_start: Callable[[int], None],
    on_drain: Callable[[str], None],
) -> signal.Signals:
    """Serve until SIGINT or SIGTERM comes, then finish what is under way; return the signal.

    From the signal on, nothing new is taken. What has not ended after `drain_s`, or when a second
    signal comes, gets an error.

    Args:
        config: of uvicorn, with the application.
        service: not started.
        drain_s: seconds for what is under way.
        workers: work beside what clients wait for.
        on_start: called with the port, once requests are taken.
        on_drain: called with a word for the user when draining begins.

    Raises:
        OSError: the port cannot be listened on.
        RuntimeError: the engine died; what was under way has got an error.
    """
    server = _Server(config)
    config.timeout_graceful_shutdown = None
    events = asyncio.get_running_loop()
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if len(received) > 1:
            service.engine.abort()
            events.call_later(ABORT_S, setattr, server, "force_exit", True)
            return
        on_drain(f"{number.name}: finishing what is under way, at most {drain_s:g} s")
        service.refuse()
        for worker in workers:
            worker.stop()
        server.should_exit = True
        events.call_later(drain_s, service.engine.abort)

    def died(error: BaseException) -> None:
        server.should_exit = True

    service.on_death = died
    try:
        with _signals(stop), _socket(config) as sock:
            await service.start()
            await _serve(server, sock, workers, on_start)
    finally:
        await service.stop(drains=False)
    death = service.engine.cause_of_death
    if death is not None:
        raise RuntimeError(f"the engine died: {type(death).__name__}: {death}") from death
    return received[0] if received else signal.SIGTERM


async def _serve(
    server: uvicorn.Server,
    sock: socket.socket,
    workers: Sequence[Worker],
    on_start: Callable[[int], None],
) -> None:
    """Answer on a socket until the server is told to end, with workers beside from its start."""
    serving = asyncio.create_task(server.serve([sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    working: list[asyncio.Task[None]] = []
    if server.started:
        on_start(sock.getsockname()[1])
        working = [asyncio.create_task(worker.run()) for worker in workers]
    await serving
    for worker in workers:
        worker.stop()
    await asyncio.gather(*working)


@contextlib.contextmanager
def _signals(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `stop` with every SIGINT and SIGTERM."""
    events, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        events.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in numbers:
            events.remove_signal_handler(number)


@contextlib.contextmanager
def _socket(config: uvicorn.Config) -> Iterator[socket.socket]:
    """Yield a socket, so that an error is ours to tell and the port is known."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # By the protocol's number asyncio knows to set TCP_NODELAY: else a piece of a stream waits for
    # the client to confirm the one before, which it puts off for 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
        yield sock
