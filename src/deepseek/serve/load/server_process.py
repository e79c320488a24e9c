"""A server that is started for a measurement: waited for, watched, stopped."""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

from deepseek.errors import BackendError, ConfigError, describe

PORT = "{port}"
_PROC = Path("/proc")
_ASK_EVERY_S = 0.2
_ASK_S = 5.0
_STOP_S = 30.0
_IS_UP = (200, 401, 403, 404, 405)
"""What a server that is up says to one who asks for its models without a key."""


class ServerProcess:
    """A command that serves, from entering until leaving.

    Args:
        command: its words, as a shell would split them; `{port}` stands for the port.
        port: where it serves; None for one that is free.
        start_s: seconds that it may take to answer.

    Raises:
        ConfigError: no command.
        BackendError: it cannot be started, it ended, or it did not answer in time.
    """

    def __init__(self, command: str, *, port: int | None = None, start_s: float = 300.0) -> None:
        self.port = free_port() if port is None else port
        self._start_s = start_s
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigError(
                describe("launch", "bench serve", f"a command ({error})", command)
            ) from error
        if not words:
            raise ConfigError(describe("launch", "bench serve", "a command", command))
        self._words = [word.replace(PORT, str(self.port)) for word in words]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed on leaving)
        self._process: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0

    def __enter__(self) -> Self:
        """Start it, in a session of its own so that Ctrl-C is ours alone."""
        began = time.monotonic()
        try:
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            must = "a command that can be started"
            got = f"{self._words[0]}: {error.strerror}"
            raise BackendError(describe("launch", "bench serve", must, got)) from error
        try:
            self._wait(began)
        except BaseException:
            self.__exit__()
            raise
        self.started_s = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it and all that it started: politely, and after 30 seconds not."""
        process = self._process
        assert process is not None
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signum)
            except ProcessLookupError:
                break
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        self._log.close()

    def cpu_s(self) -> float | None:
        """Return the processor time that it and its children have used; None where there is no
        `/proc`."""
        if not _PROC.is_dir():
            return None
        ticks = sum(
            int(field) for stat in self._stats() for field in stat[11:15]
        )  # user, system, and both of children that have ended
        return ticks / os.sysconf("SC_CLK_TCK")

    def peak_rss_bytes(self) -> int | None:
        """Return the most memory that its processes have had, added up over those that live."""
        if not _PROC.is_dir():
            return None
        return sum(_high_water_bytes(int(stat[-1])) for stat in self._stats())

    def last_words(self) -> str:
        """Return the end of what it has printed."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        lines = self._log.read().decode("utf-8", errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-5:] if line.strip())[-400:]

    def _wait(self, began: float) -> None:
        assert self._process is not None
        while time.monotonic() - began < self._start_s:
            if (code := self._process.poll()) is not None:
                must = "a server that stays"
                got = f"exit {code}: {self.last_words()}"
                raise BackendError(describe("launch", "bench serve", must, got))
            if is_up(f"http://127.0.0.1:{self.port}"):
                return
            time.sleep(_ASK_EVERY_S)
        must = f"a server that answers on port {self.port} within {self._start_s:g} s"
        raise BackendError(describe("launch", "bench serve", must, self.last_words()))

    def _stats(self) -> list[list[str]]:
        """Return the fields of `/proc/PID/stat` behind the name, and the PID, of its session."""
        assert self._process is not None
        found = []
        for folder in _PROC.iterdir():
            if not folder.name.isdigit():
                continue
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended since
                continue
            if int(fields[3]) == self._process.pid:
                found.append([*fields, folder.name])
        return found


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_up(address: str) -> bool:
    """Return whether a server answers for its models and does not say that it is loading."""
    models, health = _status(f"{address}/v1/models"), _status(f"{address}/health")
    return models in _IS_UP and health is not None and health < 500


def _status(url: str) -> int | None:
    """Return the HTTP status of an address; None where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ASK_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, http.client.HTTPException):  # nobody, not yet, or one who speaks no HTTP
        return None


def _high_water_bytes(process: int) -> int:
    try:
        lines = (_PROC / str(process) / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
