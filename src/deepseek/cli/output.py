"""What a verb says: text and tables for a person, one object for a program, progress."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deepseek.records import Measurement, Verdict

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the share of it that is done, None where that is unknown."""


class Output:
    """Where a verb's result goes.

    With `as_json` a verb's words are dropped and `finish` prints one object, so that nothing else
    reaches standard output. Progress, warnings and errors always go to standard error.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, text: str = "", *, end: str = "\n") -> None:
        """Print words for a person."""
        if not self.as_json:
            print(text, end=end, flush=True)

    def note(self, text: str) -> None:
        """Print a remark to standard error."""
        print(text, file=sys.stderr, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table for a person; the first column is a name, the others are figures."""
        if self.as_json:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.overflow = "fold"
        for row in rows:
            table.add_row(*row)
        Console(soft_wrap=False, highlight=False).print(table)

    def measurements(self, title: str, found: Sequence[Measurement]) -> None:
        """Print measurements as a table: name, value, spread, unit."""
        rows = [
            (name, number(item.value), spread(item), item.unit)
            for name, item in zip(labels(found), found, strict=True)
        ]
        self.table(title, ("measurement", "value", "spread", "unit"), rows)

    def verdicts(self, found: Sequence[Verdict]) -> None:
        """Show what gates say of a bundle; nothing where there are none."""
        if found:
            rows = [(each.gate, "yes" if each.holds else "NO", each.words) for each in found]
            self.table("gates", ("gate", "holds", "found"), rows)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield what long work reports to: a bar on a terminal, nothing where there is none."""
        if not sys.stderr.isatty():
            yield lambda what, share: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=1.0)

            def report(what: str, share: float | None) -> None:
                bar.update(task, description=what, total=None if share is None else 1.0)
                bar.update(task, completed=share or 0.0)

            yield report

    def finish(self, result: Mapping[str, Any], found: Sequence[Measurement] = ()) -> int:
        """End a verb that is done: print the object if asked for, and return exit code 0."""
        if self.as_json:
            figures = [item.to_dict() for item in found]
            whole = {**result, "measurements": figures}
            print(json.dumps(whole, ensure_ascii=False, allow_nan=False), flush=True)
        return 0

    def fail(self, error: BaseException, code: int) -> int:
        """End a verb that failed: one line, and an object if asked for; return the code."""
        line = " ".join(str(error).split())
        print(f"deepseek: {line}", file=sys.stderr, flush=True)
        if self.as_json:
            kind = type(error).__name__
            print(json.dumps({"error": {"kind": kind, "message": line}, "exit_code": code}))
        return code


def labels(found: Sequence[Measurement]) -> list[str]:
    """Return a name for each measurement; those of one name also say what they differ in."""
    named: dict[str, list[Measurement]] = {}
    for item in found:
        named.setdefault(item.name, []).append(item)
    shown = []
    for item in found:
        others = named[item.name]
        differing = [
            str(value) if key == "engine" else f"{key} {value}"
            for key, value in item.conditions.items()
            if any(other.conditions.get(key) != value for other in others)
            and isinstance(value, str | int | float)
        ]
        shown.append(", ".join([item.name, *differing[:2]]))
    return shown


def number(value: float) -> str:
    """Return a figure as a person reads it: four digits, thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def spread(item: Measurement) -> str:
    """Return the interval of a measurement as a person reads it, empty when it is exact."""
    if item.spread is None:
        return ""
    return f"{number(item.spread.low)} … {number(item.spread.high)} ({item.spread.kind})"


def size(num_bytes: float) -> str:
    """Return a number of bytes as a person reads it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")
