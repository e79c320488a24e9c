"""Writes what `verify` found: `report.html` for people, `report.json` for programs, and the cases
that failed, each in a file that `deepseek verify --case FILE` asks again."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.export.verifying.cases import Case
from deepseek.export.verifying.plots import Line, Strip, lines, strips
from deepseek.export.verifying.summary import command
from deepseek.export.verifying.verifier import Outcome, Smallest, Verified
from deepseek.hub.atomic import replace_file, replace_folder, writing
from deepseek.records import Measurement

CASES = "cases"
"""Folder of the failing cases."""
MOST_SHOWN = 50
"""Failing cases that the page lists; `report.json` has them all."""


def write_report(found: Verified, folder: Path) -> None:
    """Write the report into a folder, which is made; what an earlier one left there goes.

    Raises:
        CapacityError: the disk is full.
        ConfigError: the place cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replace_folder(folder / CASES) as cases:
        for case in _failing(found):
            text = json.dumps(case.to_dict(), indent=1) + "\n"
            (cases / f"{case.id}.json").write_text(text, encoding="utf-8")
    text = json.dumps(to_dict(found), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    replace_file(folder / "report.json", text.encode())
    replace_file(folder / "report.html", page(found).encode())


def _failing(found: Verified) -> list[Case]:
    return [
        *(outcome.case for outcome in found.departed),
        *(each.smallest for each in found.smallest),
    ]


def to_dict(found: Verified) -> dict[str, Any]:
    """Return the report as JSON-ready values; a number that is not finite becomes None."""
    return {
        "source": found.source,
        "exported": found.exported,
        "reader": found.reader,
        "kind": found.kind,
        "holds": found.holds,
        "is_partial": found.is_partial,
        "seed": found.seed,
        "cases_asked": len(found.outcomes),
        "cases_wanted": found.num_cases,
        "tolerance": dataclasses.asdict(found.tolerance),
        "command": command(found),
        "failures": [*found.failures],
        "departed": [_departed(found, each) for each in found.departed],
        "smallest": [_smallest(each) for each in found.smallest],
        "cases": [_outcome(each) for each in found.outcomes],
        "measurements": [each.to_dict() for each in found.measurements],
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "id": outcome.case.id,
        "tokens": outcome.case.num_tokens,
        "rows": len(outcome.case.rows),
        "difference": _finite(outcome.difference),
        "divergence": _finite(outcome.divergence),
        "holds": outcome.departure is None,
    }


def _departed(found: Verified, outcome: Outcome) -> dict[str, Any]:
    assert outcome.departure is not None
    return {
        "id": outcome.case.id,
        **dataclasses.asdict(outcome.departure),
        "command": command(found, outcome.case.id),
    }


def _smallest(each: Smallest) -> dict[str, Any]:
    return {
        "of": each.case.id,
        "case": each.smallest.to_dict(),
        "departure": dataclasses.asdict(each.departure),
        "layer": each.location.layer,
        "where": each.location.words,
        "differences": [_finite(value) for value in each.location.differences],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
code, pre { font-size: .85rem; overflow-wrap: anywhere; white-space: pre-wrap; }
pre { background: #f5f5f5; padding: .8rem; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.failed { color: #b00020; font-weight: 600; } .held { color: #176f2c; font-weight: 600; }
svg { max-width: 100%; height: auto; background: #fff; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #16181c; }
  pre { background: #23262b; } td, th { border-color: #3a3d42; } }
"""


def page(found: Verified) -> str:
    """Return the report as one HTML page that needs nothing beside it."""
    title = f"{found.exported} against {found.source}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _verdict(found),
        f"<pre>{html.escape(command(found))}</pre>",
        *(_smallest_section(found, each) for each in found.smallest),
        _departed_table(found),
        _plots(found),
        _measurements(found.measurements),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(part for part in parts if part)}</body></html>\n"
    )


def verdict(found: Verified) -> str:
    """Return in a line whether the export computes what its source does."""
    asked = f"{len(found.outcomes)} cases"
    if found.is_partial:
        asked = f"{len(found.outcomes)} of {found.num_cases} cases, then it was stopped"
    if found.departed:
        count = len(found.departed)
        words = f"{count} {'case departs' if count == 1 else 'cases depart'}"
        return f"{words} from the source; asked: {asked}"
    if found.failures:
        return f"{'; '.join(found.failures)}; asked: {asked}"
    return f"every case within the tolerance of {found.tolerance.name}; asked: {asked}"


def _verdict(found: Verified) -> str:
    is_bad = bool(found.departed or found.failures)
    words = html.escape(f"{verdict(found)}. Run by {found.reader}.")
    return f"<p class='{'failed' if is_bad else 'held'}'>{words}</p>"


def _smallest_section(found: Verified, each: Smallest) -> str:
    place = f"{CASES}/{each.smallest.id}.json"
    words = ["deepseek", "verify", found.source, found.exported, "--case", place]
    if found.tolerance.name != "float32":
        words += ["--tolerance", found.tolerance.name]
    parts = [
        f"<h2>{html.escape(each.case.id)}, made small</h2>",
        f"<p>{html.escape(each.departure.words)}. Where: "
        f"<b>{html.escape(each.location.words)}</b>.</p>",
        f"<pre>{html.escape(described(each.smallest))}</pre>",
        f"<pre>{html.escape(shlex.join(words))}</pre>",
    ]
    if each.location.differences:
        values = [max(value, 1e-9) for value in each.location.differences]
        line = Line("difference of states", [*range(len(values))], values)
        parts.append(lines("states behind each layer, share of their length", "layer", [line]))
    return "".join(parts)


def described(case: Case) -> str:
    """Return what a case asks, in words: its rows, padding and pieces."""
    shape = f"{len(case.rows)} x {case.width}"
    parts = [f"{shape}, {case.num_tokens} tokens"]
    if case.width > min(map(len, case.rows)):
        parts.append(f"padded on the {case.side} with {case.filler}")
    if case.steps:
        parts.append(f"in pieces of {', '.join(map(str, case.steps))}")
    if case.forks:
        parts.append("each piece read twice from one state")
    rows = "\n".join(_row(row) for row in case.rows)
    return f"{'; '.join(parts)}\n{rows}"


def _row(row: Sequence[int]) -> str:
    shown = " ".join(map(str, row[:40]))
    return shown if len(row) <= 40 else f"{shown} … {' '.join(map(str, row[-4:]))}"


def _departed_table(found: Verified) -> str:
    if not found.departed:
        return ""
    rows = [
        f"<tr><td><code>{html.escape(each.case.id)}</code></td>"
        f"<td class='figure'>{each.case.num_tokens}</td>"
        f"<td>{html.escape(each.departure.words if each.departure else '')}</td></tr>"
        for each in found.departed[:MOST_SHOWN]
    ]
    left = len(found.departed) - len(rows)
    more = f"<p>… and {left} more, in report.json</p>" if left else ""
    return (
        "<h2>cases that depart</h2><table><tr><th>--case</th><th>tokens</th><th>how</th></tr>"
        f"{''.join(rows)}</table>{more}"
    )


def _plots(found: Verified) -> str:
    kinds = dict.fromkeys(each.case.kind for each in found.outcomes)
    by_kind = [
        Strip(kind, [each.difference for each in found.outcomes if each.case.kind == kind])
        for kind in kinds
    ]
    drawn = [strips("largest difference of each case, standard deviations", by_kind, _limit(found))]
    positions = found.positions
    if len(positions.difference):
        drawn.append(_along_positions(found))
    if len(positions.divergence):
        ranks = [50, 75, 90, 95, 99, 99.9, 100]
        values = np.percentile(positions.divergence, ranks, method="lower")
        line = Line("KL", [*range(len(ranks))], [max(float(value), 1e-12) for value in values])
        names = [f"{rank:g} %" for rank in ranks]
        title = "KL(source || export) by percentile of positions, nats"
        drawn.append(lines(title, "percentile", [line], names=names))
    return "<h2>how far</h2>" + "".join(drawn)


def _along_positions(found: Verified) -> str:
    """Draw the largest and the median difference against the place in the row, in octaves."""
    place, difference = found.positions.place, found.positions.difference
    octave = np.floor(np.log2(place + 1)).astype(int)
    edges = [*range(int(octave.max()) + 1)]
    most, middle = [], []
    for edge in edges:
        there = difference[octave == edge]
        finite = there[np.isfinite(there)]
        most.append(float(finite.max()) if len(finite) else 1.0)
        middle.append(float(np.median(finite)) if len(finite) else 1.0)
    names = [f"{2**edge - 1}" for edge in edges]
    shown = [
        Line("largest", edges, [max(value, 1e-9) for value in most]),
        Line("median", edges, [max(value, 1e-9) for value in middle]),
    ]
    title = "difference by place in the row, standard deviations"
    return lines(title, "first place of each octave", shown, names=names)


def _limit(found: Verified) -> float | None:
    return found.tolerance.difference


def _measurements(found: Sequence[Measurement]) -> str:
    rows = []
    for item in found:
        rank = item.conditions.get("percentile")
        name = item.name if rank is None else f"{item.name}, percentile {rank:g}"
        spread = "" if item.spread is None else f"{item.spread.low:.4g} … {item.spread.high:.4g}"
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td class='figure'>{item.value:.4g}</td>"
            f"<td class='figure'>{spread}</td><td>{html.escape(item.unit)}</td></tr>"
        )
    head = "<tr><th>measurement</th><th>value</th><th>95 %</th><th>unit</th></tr>"
    return f"<h2>measurements</h2><table>{head}{''.join(rows)}</table>"
