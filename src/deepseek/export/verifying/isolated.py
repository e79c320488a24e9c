"""Runs a reader in a process of its own: a foreign runtime that crashes or hangs costs a case, not
the run.

The two sides talk through a pair of pipes. A request is the name of a method and small values;
arrays follow as plain bytes, so that gigabytes of logits are not pickled. States stay with the
child, under a number; the parent drops them by that number.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, cast

import numpy as np

from deepseek import errors
from deepseek.errors import DeepseekError, VerifyError, describe
from deepseek.export.formats import Floats, Ids, Kind, Reader, open_exported

_STDERR = 2
TIMEOUT_S = 600.0
"""Longest wait for an answer."""


class ReaderCrash(VerifyError):
    """The process of a reader ended, or gave no answer in time."""


class IsolatedReader:
    """The reader of an export, in a process of its own that is started anew after a crash.

    Args:
        folder: what `export` wrote.
        format: None to know it by its files.
        threads: to compute with; None for the runtime's own choice.
        timeout_s: longest wait for an answer.

    Raises:
        ConfigError, FormatError, MissingExtra: as `open_exported`.
        ReaderCrash: the process ended while it opened the files.
    """

    def __init__(
        self,
        folder: str | Path,
        format: str | None = None,
        *,
        threads: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._asked = (str(folder), format, threads)
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._dropped: list[int] = []
        self._last_state = 0
        facts = self._start()
        self.name: str = facts["name"]
        self.kind: Kind = facts["kind"]
        self.max_tokens: int = facts["max_tokens"]
        self.max_batch: int = facts["max_batch"]
        self.has_cache: bool = facts["has_cache"]

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Return what the model answers for a batch; see `Reader`."""
        return self._call("forward", ids, mask)[0]

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        """Read more tokens; see `Reader`. A state of a process that has crashed is of no use."""
        number = None if state is None else cast("_State", state).number
        answers = self._call("step", ids, number=number)
        return answers[0], _State(self, self._last_state)

    def layers(self, ids: Ids, mask: Ids) -> Sequence[Floats] | None:
        """Return the states behind each layer; see `Reader`."""
        return self._call("layers", ids, mask) or None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> dict[str, Any]:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        # what a runtime prints must not end up in our own result
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=_STDERR)
        theirs.close()
        self._connection = ours
        weakref.finalize(self, _end, self._process)
        self._dropped.clear()
        self._connection.send(self._asked)
        return self._receive()

    def _call(self, method: str, *arrays: Ids, number: int | None = None) -> list[Floats]:
        if self._process is None:
            self._start()
        dropped = self._dropped.copy()
        self._dropped.clear()
        try:
            self._connection.send((method, number, dropped, [array.shape for array in arrays]))
            for array in arrays:
                self._connection.send_bytes(np.ascontiguousarray(array).data)
        except OSError as error:
            raise self._crashed() from error
        facts = self._receive()
        self._last_state = facts["state"]
        return [self._receive_array(shape) for shape in facts["shapes"]]

    def _receive(self) -> dict[str, Any]:
        try:
            if not self._connection.poll(self._timeout_s):
                raise self._crashed()
            facts = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._crashed() from error
        if "error" in facts:
            raise _as_error(facts)
        return facts

    def _receive_array(self, shape: tuple[int, ...]) -> Floats:
        array = np.empty(shape, np.float32)
        try:
            self._connection.recv_bytes_into(array.data.cast("B"))
        except (EOFError, OSError) as error:
            raise self._crashed() from error
        return array

    def _crashed(self) -> ReaderCrash:
        process = self._process
        assert process is not None
        self._process = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        code = process.poll()
        process.kill()
        process.wait()
        self._connection.close()
        got = f"none in {self._timeout_s:g} s" if code is None else _ending(code)
        return ReaderCrash(describe("answer", "the reader's process", "given", got))


class _State:
    """A state that the child holds, forgotten there when it is forgotten here."""

    def __init__(self, reader: IsolatedReader, number: int) -> None:
        self.number = number
        weakref.finalize(self, reader._dropped.append, number)


def _told(error: Exception) -> dict[str, str]:
    """Return what the child says of an error: its class, where it is one of ours, and its words."""
    is_ours = isinstance(error, DeepseekError)
    words = str(error) if is_ours else f"{type(error).__name__}: {error}"
    return {"error": type(error).__name__ if is_ours else "VerifyError", "words": words}


def _as_error(facts: dict[str, Any]) -> DeepseekError:
    """Return the error that the child told of."""
    return getattr(errors, facts["error"], VerifyError)(" ".join(facts["words"].split()))


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"an end by {signal.Signals(-code).name}"
    return f"an end with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def serve(connection: Connection) -> None:
    """Answer the parent until it is gone."""
    folder, format, threads = connection.recv()
    try:
        reader = open_exported(folder, format, threads=threads)
    except Exception as error:
        connection.send(_told(error))
        return
    names = ("name", "kind", "max_tokens", "max_batch", "has_cache")
    connection.send({name: getattr(reader, name) for name in names})
    states: dict[int, object] = {}
    while True:
        method, number, dropped, shapes = connection.recv()
        arrays = [
            np.frombuffer(connection.recv_bytes(), np.int64).reshape(shape).copy()
            for shape in shapes
        ]
        for gone in dropped:
            states.pop(gone, None)
        try:
            answers = _answer(reader, method, arrays, number, states)
        except Exception as error:
            connection.send(_told(error))
            continue
        shown = {"state": len(states) and max(states), "shapes": [each.shape for each in answers]}
        connection.send(shown)
        for each in answers:
            connection.send_bytes(each.data.cast("B"))


def _answer(
    reader: Reader,
    method: str,
    arrays: list[Ids],
    number: int | None,
    states: dict[int, object],
) -> list[Floats]:
    if method == "step":
        found, state = reader.step(arrays[0], None if number is None else states[number])
        states[max(states, default=0) + 1] = state
        answers: Sequence[Floats] = [found]
    elif method == "forward":
        answers = [reader.forward(*arrays)]
    else:
        answers = reader.layers(*arrays) or []
    return [np.ascontiguousarray(each, np.float32) for each in answers]


def _main() -> None:
    # A stop of the whole group of processes is the parent's to answer: it ends us by the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    _main()
