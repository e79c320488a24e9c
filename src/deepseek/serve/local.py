"""A server of one's own for a while: a process that ends with the block it was started for."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek.errors import BackendError

_ADDRESS = re.compile(r" answers on (http://\S+)")
KEPT_LINES = 50


class LocalServer:
    """A process that runs `deepseek serve`. Made by `local_server`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._answers = threading.Event()
        self.url = ""
        """Of the API, to be given to a client as its base."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """The last lines that it has written."""
        return "\n".join(self._lines)

    def wait_until_it_answers(self, timeout_s: float) -> None:
        """Wait until it takes requests.

        Raises:
            BackendError: it ended before, or takes too long.
        """
        if not self._answers.wait(timeout_s) or not self.url:
            reason = self.log or "it said nothing"
            raise BackendError(f"The server did not start within {timeout_s:g} s: {reason}")

    def stop(self) -> int:
        """Let it finish what is under way; return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self._lines.append(line.rstrip())
                found = _ADDRESS.search(line)
                if found is not None:
                    self.url = found[1]
                    self._answers.set()
        self._answers.set()


@contextlib.contextmanager
def local_server(
    model: str | Path, options: Sequence[str] = (), *, start_timeout_s: float = 300.0
) -> Iterator[LocalServer]:
    """Serve a model on a free port of this machine while the block runs.

    Args:
        model: a name or a folder.
        options: further words for `deepseek serve`; without `--state` nothing is kept.
        start_timeout_s: longest that it may take to start.

    Raises:
        BackendError: it did not start; the message says what it wrote.
    """
    words = [sys.executable, "-m", "deepseek", "serve", str(model), "--port", "0"]
    words += ["--state", "none", *options]
    server = LocalServer(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
    try:
        server.wait_until_it_answers(start_timeout_s)
        yield server
    finally:
        server.stop()
