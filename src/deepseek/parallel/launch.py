"""Starts the processes of a world on this machine. Across machines `torchrun` does."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STORE = "DEEPSEEK_STORE"
"""Names the file by which the processes of `run_workers` find each other."""
GRACE_S = 30.0
"""How long the others may take to end when one has failed."""


def run_workers(words: Sequence[str], num_workers: int) -> int:
    """Run a command in several processes that find each other by `joined_world`; return the exit
    code of the first that failed, or 0.

    SIGINT and SIGTERM are handed on, and waited for. What the first worker says is shown; what
    another says to standard error is shown where it alone failed.

    Args:
        words: the command.
        num_workers: how many.
    """
    with tempfile.TemporaryDirectory(prefix="deepseek-workers-") as place:
        logs = [Path(place) / f"worker-{rank}" for rank in range(num_workers)]
        started = [
            _start(words, rank, num_workers, Path(place) / "store", logs[rank])
            for rank in range(num_workers)
        ]
        with _handing_on(started):
            codes = _wait(started)
        return _judge(codes, logs)


def _judge(codes: Sequence[int], logs: Sequence[Path]) -> int:
    """Return the exit code of the first worker that failed by itself, and show what it said."""
    by_itself = [rank for rank, code in enumerate(codes) if code > 0]
    if by_itself:
        if by_itself[0] != 0:
            os.write(2, logs[by_itself[0]].read_bytes())
        return codes[by_itself[0]]
    # the others were ended by a signal, as a shell tells it
    return max((128 - code for code in codes if code < 0), default=0)


def _start(
    words: Sequence[str], rank: int, num_workers: int, store: Path, log: Path
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        STORE: str(store),
    }
    if rank == 0:
        return subprocess.Popen(words, env=environment)
    with log.open("wb") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes; when one fails the others are ended."""
    deadline = None
    while any(process.poll() is None for process in started):
        has_failed = any(process.poll() not in (None, 0) for process in started)
        if has_failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
            _signal(started, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _signal(started, signal.SIGKILL)
        time.sleep(0.05)
    return [process.wait() for process in started]


def _signal(started: Sequence[subprocess.Popen[bytes]], kind: signal.Signals) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(kind)


class _handing_on:
    """Sends the signals that this process gets to the workers."""

    def __init__(self, started: Sequence[subprocess.Popen[bytes]]) -> None:
        self._started = started

    def __enter__(self) -> None:
        def hand_on(number: int, _: object) -> None:
            _signal(self._started, signal.Signals(number))

        self._old = {kind: signal.signal(kind, hand_on) for kind in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._old.items():
            signal.signal(kind, handler)
