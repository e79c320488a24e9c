"""Starts the processes of a world on this machine. Across machines `torchrun` does."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STORE = "DEEPSEEK_STORE"
"""Names the file by which the processes of `run_workers` find each other."""
SETTLE_S = 5.0
"""How long the others may take to end by themselves when one has failed: a mistake in the command
ends them all, and each says so."""
GRACE_S = 30.0
"""How long they may take to end after that, when they are told to."""


def run_workers(words: Sequence[str], num_workers: int) -> int:
    """Run a command in several processes that find each other by `joined_world`; return the exit
    code of the one that failed first, or 0.

    SIGINT and SIGTERM are handed on, and waited for. What the first worker says is shown; what
    another says to standard error is shown where that one failed first, and the first worker did
    not end by the same code.

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
            codes, first = _wait(started)
        return _judge(codes, first, logs)


def _judge(codes: Sequence[int], first: int | None, logs: Sequence[Path]) -> int:
    """Return the exit code of the worker that failed first by itself, and show what it said, unless
    the first worker has said the same."""
    if first is not None:
        if codes[0] != codes[first]:
            os.write(2, logs[first].read_bytes())
        return codes[first]
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
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=file)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> tuple[list[int], int | None]:
    """Return the exit codes, and which worker failed first by itself; when one fails the others are
    ended."""
    failed_at, first, is_told = math.inf, None, False
    while any(process.poll() is None for process in started):
        now, codes = time.monotonic(), [process.poll() or 0 for process in started]
        first = _first_failed(codes) if first is None else first
        if any(codes):
            failed_at = min(failed_at, now)
        if now > failed_at + SETTLE_S + GRACE_S:
            _signal(started, signal.SIGKILL)
        elif now > failed_at + SETTLE_S and not is_told:
            is_told = True
            _signal(started, signal.SIGTERM)
        time.sleep(0.05)
    codes = [process.wait() for process in started]
    return codes, _first_failed(codes) if first is None else first


def _first_failed(codes: Sequence[int]) -> int | None:
    """Return the first worker that ended by an error of its own, not by a signal."""
    return next((rank for rank, code in enumerate(codes) if code > 0), None)


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
