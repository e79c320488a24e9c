"""A real server process: signals, draining, a port in use, an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from deepseek.serve.api.guards import RequestLog
from deepseek.serve.running import _socket
from tests.ops.native import NEEDS_KERNELS
from tests.serve.bundles import tiny_bundle

pytestmark = NEEDS_KERNELS

DIES = """
import sys
from deepseek.cli.main import main
from deepseek.serve.runtime.engine_executor import EngineExecutor
execute, steps = EngineExecutor.execute, [0]
def dying(self, work, copies):
    steps[0] += 1
    return execute(self, work, copies) if steps[0] < 5 else 1 / 0
EngineExecutor.execute = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model as a folder; its answers may be long."""
    return tiny_bundle(tmp_path_factory.mktemp("models"), context=8192)


@dataclasses.dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def end(self) -> tuple[int, str]:
        """Return the exit code and what was written behind the address."""
        assert self.process.stderr is not None
        rest = self.process.stderr.read()
        return self.process.wait(20), rest


@contextlib.contextmanager
def serving(
    bundle: Path, *options: str, script: str | None = None, **settings: str
) -> Iterator[Server]:
    words = ["-m", "deepseek"] if script is None else ["-c", script]
    command = [sys.executable, *words, "serve", str(bundle), "--port", "0", "--pages", "300"]
    command += ["--state", "none"]
    environment = {**os.environ, **settings}
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line + process.stderr.read()
        yield Server(process, found[0])
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@dataclasses.dataclass
class Answer:
    """A streamed completion, read on a thread."""

    url: str
    tokens: int
    events: list[dict[str, object]] = dataclasses.field(default_factory=list)
    begun: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        assert self.begun.wait(20)

    def _read(self) -> None:
        body = {"model": "tiny", "prompt": "x", "stream": True, "ignore_eos": True}
        body["max_tokens"] = self.tokens  # type: ignore[assignment]
        request = httpx.stream("POST", f"{self.url}/completions", json=body, timeout=30)
        with contextlib.suppress(httpx.HTTPError), request as response:
            for line in response.iter_lines():
                self.begun.set()
                if line.startswith("data: {"):
                    self.events.append(json.loads(line[6:]))

    def wait(self) -> list[dict[str, object]]:
        self.thread.join(30)
        return self.events

    @property
    def reason(self) -> object:
        return self.wait()[-1]["choices"][0]["finish_reason"]  # type: ignore[index]


def test_sigterm_finishes_what_is_under_way_and_takes_nothing_new(bundle: Path) -> None:
    with serving(bundle, "--name", "tiny") as server:
        answer = Answer(server.url, 1500)
        with httpx.Client() as client:
            assert client.get(f"{server.url}/models").status_code == 200
            server.process.send_signal(signal.SIGTERM)
        assert answer.reason == "length"
        code, rest = server.end()
        assert code == 0 and "SIGTERM: finishing what is under way" in rest
        assert "Traceback" not in rest


def test_a_second_signal_does_not_wait_and_what_was_under_way_gets_an_error(bundle: Path) -> None:
    with serving(bundle, "--name", "tiny") as server:
        answer = Answer(server.url, 8000)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        code, rest = server.end()
        assert code == 130 and time.monotonic() - start_s < 5
        assert "Traceback" not in rest
        assert "error" in answer.wait()[-1]


def test_a_request_that_is_cut_off_is_logged_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures: list[str | None] = []

    async def cut_off() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.Event().wait()

        async def nothing(*args: object) -> Message:
            raise AssertionError("neither read nor written")

        log = RequestLog(
            app, clock=time.monotonic, on_response=lambda status, failure: failures.append(failure)
        )
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        request = asyncio.create_task(log(scope, nothing, nothing))
        await asyncio.sleep(0)
        request.cancel()
        await request

    with caplog.at_level("INFO"):
        asyncio.run(cut_off())
    assert failures == ["cut off"]
    assert json.loads(caplog.records[-1].message)["failure"] == "cut off"
    assert all(record.exc_info is None for record in caplog.records)


def test_what_has_not_ended_in_time_gets_an_error(bundle: Path) -> None:
    with serving(bundle, "--name", "tiny", "--drain-seconds", "0.2") as server:
        answer = Answer(server.url, 8000)
        server.process.send_signal(signal.SIGTERM)
        assert "error" in answer.wait()[-1]
        assert server.end()[0] == 0


def test_attack_31_an_engine_that_dies_ends_the_process_with_an_error(bundle: Path) -> None:
    with serving(bundle, "--name", "tiny", "--no-guesses", script=DIES) as server:
        answer = Answer(server.url, 1000)
        assert answer.wait()[-1]["error"]["code"] == "engine_error"  # type: ignore[index]
        code, rest = server.end()
        assert code == 70
        assert rest.strip().splitlines()[-1].startswith("deepseek: RuntimeError: the engine")


def test_a_port_in_use_and_a_host_without_keys_are_told_in_one_line(bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, told in (
            (["--port", port], "in use"),
            (["--host", "0.0.0.0"], "while there are no keys"),
            (["--context", "100000000"], ""),
            (["--port", "99999"], "from 0 to 65535"),
            (["--port", "-1"], "--port"),
            (["--drain-seconds", "nan"], "at least 0"),
            (["--price-per-hour", "-1"], "--price-per-hour"),
            (["--step-tokens", "10"], "at least 64, a token for each"),
            (["--add-key", ""], "a folder where keys are kept"),
        ):
            command = [sys.executable, "-m", "deepseek", "serve", str(bundle), "--pages", "300"]
            command += ["--state", "none"]
            done = subprocess.run([*command, *options], capture_output=True, text=True)
            assert done.returncode == 2 and told in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""


def test_keys_of_the_environment_are_asked_for(bundle: Path) -> None:
    with serving(bundle, "--name", "tiny", DEEPSEEK_API_KEYS="one,two") as server:
        for key, status in ((None, 401), ("three", 401), ("two", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/models", headers=headers).status_code == status


def test_pieces_of_a_stream_are_sent_at_once() -> None:
    """With Nagle's algorithm the second piece waits 40 ms for the client to confirm the first."""

    async def no_delay() -> int:
        config = uvicorn.Config(lambda: None, host="127.0.0.1", port=0)
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _socket(config) as sock:
            async with await asyncio.start_server(accept, sock=sock):
                _, writer = await asyncio.open_connection(*sock.getsockname())
                value = await found
                writer.close()
        return value

    assert asyncio.run(asyncio.wait_for(no_delay(), 10)) != 0
