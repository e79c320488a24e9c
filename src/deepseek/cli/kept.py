"""What a long benchmark has measured so far, in a file, so that one that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek.errors import ConfigError, FormatError, describe


class Kept:
    """Figures by the step that gave them: a JSON line each, on the disk before the next step.

    The first line says what is measured. A last line that a kill cut short is dropped.

    Args:
        path: the file; it is made, or gone on from. None keeps nothing.
        about: what every figure in it depends on, JSON-ready.
        owner: the benchmark, as its user calls it.

    Raises:
        ConfigError: the file is of another measurement, or of none.
    """

    def __init__(
        self, path: Path | None, about: Mapping[str, Any], owner: str = "bench attention"
    ) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path is None:
            return
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]
        if lines:
            header, *rest = (_read(line, path, owner) for line in lines)
            if header != about:
                names = [name for name in about if header.get(name) != about[name]]
                must = f"of the same measurement ({', '.join(names)} differ)"
                step = "Give another file, or the same options"
                raise ConfigError(describe("keep", owner, must, str(path), step))
            self._found = {json.dumps(each["step"]): each["found"] for each in rest}
        path.write_bytes(b"".join(lines))
        if not lines:
            self._add(about)

    def step(self, step: object, measure: Callable[[], Any]) -> Any:
        """Return what a step found, measured unless the file has it.

        Args:
            step: says which, JSON-ready.
            measure: returns what is found, JSON-ready.
        """
        key = json.dumps(step)
        if key not in self._found:
            self._found[key] = measure()
            self._add({"step": step, "found": self._found[key]})
        return self._found[key]

    def _add(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(line: bytes, path: Path, owner: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        must = "a file that this benchmark wrote"
        raise FormatError(describe("keep", owner, must, str(path))) from error
    if not isinstance(found, dict):
        must = "a file that this benchmark wrote"
        raise FormatError(describe("keep", owner, must, str(path)))
    return found
