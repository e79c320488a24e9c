"""A tiny server that speaks OpenAI's API as it is told to: right, wrong, late, or not to the end.

    python tests/serve/load/fake_server.py PORT [start_after_s]

serves plain answers until it is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Step = bytes | float | None
"""Bytes to send, seconds to wait, or None for a connection that breaks."""
Reply = Callable[[dict[str, Any]], list[Step]]

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Clock:
    """A clock that only the server moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_reads = 0

    def __call__(self) -> float:
        self.num_reads += 1
        return self.now


def event(**fields: Any) -> bytes:
    """Return an event with an object."""
    return f"data: {json.dumps(fields)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def piece(text: str, reason: str | None = None) -> bytes:
    """Return a piece of a completion."""
    return event(choices=[{"index": 0, "text": text, "finish_reason": reason}])


def delta(reason: str | None = None, **fields: Any) -> bytes:
    """Return a piece of a chat's answer."""
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": reason}])


def usage(prompt: int, answer: int, cached: int | None = None) -> bytes:
    """Return the piece that counts."""
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": answer}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event(choices=[], usage=counts)


def http(status: int, body: bytes, *headers: str) -> bytes:
    """Return a whole answer that is no stream."""
    lines = [f"HTTP/1.1 {status} Told", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def plain(asked: dict[str, Any]) -> list[Step]:
    """Answer with as many words as are asked for, at once."""
    count = asked["max_tokens"]
    is_chat = "messages" in asked
    words = [delta(role="assistant", content="")] if is_chat else []
    words += [delta(content=f" w{n}") if is_chat else piece(f" w{n}") for n in range(count)]
    last = delta("length") if is_chat else piece("", "length")
    text = json.dumps(asked.get("messages", asked.get("prompt")))
    return [STREAM, *words, last, usage(len(text.split()), count, 1), DONE]


class FakeServer:
    """Serves from entering to leaving.

    Args:
        reply: what is answered to a request for an answer.
        clock: moved by the waits in place of real ones; a wait begins when all that was sent before
            it has been read.
    """

    def __init__(self, reply: Reply = plain, clock: Clock | None = None) -> None:
        self.reply = reply
        self.clock = clock
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_open = self.most_open = 0
        self.num_lost = 0
        """Connections whose client left before the end."""
        self.port = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            if head[0].startswith("GET /v1/models"):
                listed = json.dumps({"data": [{"id": "fake"}]}).encode()
                writer.write(http(200, listed, "Content-Type: application/json"))
                await writer.drain()
            elif head[0].startswith("POST"):
                self.headers.append(fields)
                self.asked.append({**json.loads(body), "path": head[0].split()[1]})
                await self._answer(self.asked[-1], reader, writer)
            else:
                writer.write(http(404, b"no such page"))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.num_open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(
        self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        gone = asyncio.ensure_future(reader.read())
        for step in self.reply(asked):
            if gone.done():
                self.num_lost += 1
                return
            if step is None:
                gone.cancel()
                writer.transport.abort()
                return
            if isinstance(step, bytes):
                reads = self.clock.num_reads if self.clock else 0
                writer.write(step)
                await writer.drain()
                if self.clock is not None and step is not STREAM:
                    await self._read_on(reads, gone)
            elif self.clock is not None:
                self.clock.now += step
            else:
                await asyncio.wait([gone], timeout=step)
        gone.cancel()

    async def _read_on(self, reads: int, gone: asyncio.Future[bytes]) -> None:
        """Wait until the client has taken the time of what was sent."""
        assert self.clock is not None
        until = time.monotonic() + 5
        while self.clock.num_reads == reads and not gone.done():
            assert time.monotonic() < until, "nobody reads"
            await asyncio.sleep(0)


@contextlib.contextmanager
def serving(reply: Reply = plain, kind: type[FakeServer] = FakeServer) -> Iterator[FakeServer]:
    """Yield a server that runs in a thread of its own."""
    server = kind(reply)
    started, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        async with server:
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def _main(port: int, after_s: float) -> None:
    await asyncio.sleep(after_s)
    server = FakeServer()
    server.port = port
    async with server:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float((sys.argv[2:] or ["0"])[0])))
