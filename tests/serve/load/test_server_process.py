"""A server that is started for a measurement: waited for, counted, stopped with all it started."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from deepseek.errors import BackendError, ConfigError
from deepseek.serve.load import ServerProcess
from deepseek.serve.load.server_process import free_port, is_up
from tests.serve.load.fake_server import FakeServer, http, serving

FAKE = f"{shlex.quote(sys.executable)} {Path(__file__).with_name('fake_server.py')} {{port}}"


def words(code: str) -> str:
    """Return the command that runs Python code."""
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {{port}}"


def is_there(process: int) -> bool:
    """Return whether a process lives; one that has ended and was not asked for does not."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_server_is_waited_for_and_stopped() -> None:
    with ServerProcess(f"{FAKE} 0.4") as server:
        assert is_up(f"http://127.0.0.1:{server.port}")
        assert server.started_s >= 0.4
        used = server.cpu_s()
        assert used is not None and 0 < used < 60
        peak = server.peak_rss_bytes()
        assert peak is not None and 5 << 20 < peak < 1 << 30
    assert not is_up(f"http://127.0.0.1:{server.port}")


def test_a_port_may_be_given() -> None:
    port = free_port()
    with ServerProcess(FAKE, port=port) as server:
        assert server.port == port and is_up(f"http://127.0.0.1:{port}")


WORKING = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "x = bytearray(40 << 20)\\nwhile True: x[0] = 1"])
print("child", child.pid, flush=True)
os.execv(sys.executable, [sys.executable, {fake!r}, sys.argv[1]])
"""


def test_children_count_and_are_stopped() -> None:
    code = WORKING.format(fake=str(Path(__file__).with_name("fake_server.py")))
    with ServerProcess(words(code)) as server:
        child = int(server.last_words().split()[1])
        until = time.monotonic() + 10
        before = server.cpu_s()
        assert before is not None
        while (server.cpu_s() or 0) < before + 0.1:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert (server.peak_rss_bytes() or 0) > 45 << 20
        assert is_there(child)
    until = time.monotonic() + 10
    while is_there(child):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_that_ignores_being_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.serve.load.server_process._STOP_S", 0.2)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += f"import runpy, sys; runpy.run_path({str(Path(__file__).with_name('fake_server.py'))!r}"
    code += ", run_name='__main__')"
    with ServerProcess(words(code)) as server:
        port = server.port
    assert not is_up(f"http://127.0.0.1:{port}")


def test_a_server_that_ends_is_told_with_its_last_words() -> None:
    code = "print('loading'); raise SystemExit('no such model: tiny')"
    with pytest.raises(BackendError, match=r"a server that stays; got 'exit 1: .*no such model"):
        ServerProcess(words(code)).__enter__()


def test_a_server_that_never_answers_is_given_up() -> None:
    before = set(os.listdir("/proc")) if os.path.isdir("/proc") else set()
    code = "import time; print('still loading', flush=True); time.sleep(60)"
    with pytest.raises(BackendError, match=r"within 0.5 s; got 'still loading'"):
        ServerProcess(words(code), start_s=0.5).__enter__()
    mine = [each for each in set(os.listdir("/proc")) - before if each.isdigit()]
    assert not any(b"still loading" in command(each) for each in mine)


def command(process: str) -> bytes:
    """Return the words a process was started with."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_server_that_is_loading_is_not_up() -> None:
    assert not is_up(f"http://127.0.0.1:{free_port()}")

    class Loading(FakeServer):
        """Lists its models before they are loaded, as llama.cpp's does."""

        status = 503

        async def _serve(self, reader, writer):  # type: ignore[no-untyped-def, override]
            head = await reader.readuntil(b"\r\n\r\n")
            status = self.status if head.startswith(b"GET /health") else 200
            writer.write(http(status, b"{}"))
            await writer.drain()
            writer.close()

    for status, expected in ((503, False), (200, True), (404, True)):
        Loading.status = status
        with serving(kind=Loading) as server:
            assert is_up(server.url) is expected


@pytest.mark.parametrize("wrong", ["", "  ", "'open"])
def test_what_is_no_command_is_told(wrong: str) -> None:
    with pytest.raises(ConfigError, match="launch of bench serve must be a command"):
        ServerProcess(wrong)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(BackendError, match="can be started; got '/no/such/program: No such file"):
        ServerProcess("/no/such/program {port}").__enter__()


def test_processor_time_is_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User's and system's, of its own and of children that have ended; other sessions' is not."""
    with ServerProcess(FAKE) as server:
        assert server._process is not None
        for place, session in enumerate((server._process.pid, server._process.pid, 1)):
            folder = tmp_path / str(place)
            folder.mkdir()
            rest = f"S 1 1 {session} 0 0 0 0 0 0 0 1 20 300 4000 0 0"
            (folder / "stat").write_text(f"{place} (a (b) c) {rest}\n")
        monkeypatch.setattr("deepseek.serve.load.server_process._PROC", tmp_path)
        assert server.cpu_s() == pytest.approx(2 * 4321 / os.sysconf("SC_CLK_TCK"))
