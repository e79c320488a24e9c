"""The tables of `deepseek bench serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek.cli.output import Output, number, size
from deepseek.records import Measurement
from deepseek.serve.load.summary import LATENCIES, PERCENTILES

Figures = Mapping[str, float]
"""Values of one load by name, and by `name statistic` where there are several."""
_RATES = ("requests_per_s", "new_tokens_per_s", "goodput_share", "errors")
_COSTS = (
    "client_cpu_s",
    "server_cpu_s",
    "server_cpu_s_per_token",
    "server_peak_rss_bytes",
    "energy_j_per_request",
    "cost_per_request",
)


def show_loads(
    title: str, points: Sequence[Mapping[str, Any]], found: Sequence[Measurement], out: Output
) -> None:
    """Print rates, latencies, turns, costs, worst cases and errors of every load."""
    loads: dict[str, list[Measurement]] = {str(point["load"]): [] for point in points}
    count = iter(found)
    for point in points:
        loads[str(point["load"])] = [next(count) for _ in point["measurements"]]
    figures = {load: _by_name(items) for load, items in loads.items()}
    _rows(title, _RATES, figures, out)
    for name, told in LATENCIES.items():
        if any(f"{name} p50" in each for each in figures.values()):
            _latency(name, told, figures, out)
    _turns(loads, out)
    _rows("what it cost", _COSTS, figures, out)
    _worst(points, out)
    errors = [
        (f"{point['load']}, {kind}", words)
        for point in points
        for kind, words in point["errors"].items()
    ]
    if errors:
        out.say()
        out.table("errors, the first of each kind", ("", "said"), errors)


def _by_name(items: Sequence[Measurement]) -> dict[str, float]:
    figures = {}
    for each in items:
        statistic = each.conditions.get("statistic")
        if "turn" not in each.conditions:
            figures[f"{each.name} {statistic}" if statistic else each.name] = each.value
    return figures


def _rows(title: str, names: Sequence[str], loads: Mapping[str, Figures], out: Output) -> None:
    shown = [name for name in names if any(name in each for each in loads.values())]
    rows = [
        (load, *(_shown(name, figures[name]) if name in figures else "" for name in shown))
        for load, figures in loads.items()
    ]
    if shown:
        out.say()
        out.table(title, ("load", *(name.replace("_", " ") for name in shown)), rows)


def _shown(name: str, value: float) -> str:
    return size(value) if name.endswith("_bytes") else number(value)


def _latency(name: str, told: str, loads: Mapping[str, Figures], out: Output) -> None:
    statistics = ("p50", *PERCENTILES)
    rows = [
        (load, *(f"{figures[f'{name} {each}'] * 1000:,.1f}" for each in statistics))
        for load, figures in loads.items()
        if f"{name} p50" in figures
    ]
    out.say()
    out.table(f"{told}, ms", ("load", *statistics), rows)


def _turns(loads: Mapping[str, Sequence[Measurement]], out: Output) -> None:
    rows = []
    for load, items in loads.items():
        turns: dict[int, dict[str, float]] = {}
        for each in items:
            if "turn" in each.conditions:
                statistics = turns.setdefault(int(each.conditions["turn"]), {})
                statistics[str(each.conditions["statistic"])] = each.value
        for turn, values in turns.items():
            told = (f"{values[each] * 1000:,.1f}" for each in ("p50", *PERCENTILES))
            rows.append((f"{load}, turn {turn}", *told))
    if rows:
        out.say()
        out.table("time to first token of each turn, ms", ("", "p50", *PERCENTILES), rows)


def _worst(points: Sequence[Mapping[str, Any]], out: Output) -> None:
    rows = [
        (
            f"{point['load']}, dialogue {each['dialogue']}, turn {each['turn'] + 1}",
            *(number(each[name]) for name in ("first_token_s", "longest_gap_s", "end_to_end_s")),
        )
        for point in points
        for each in point["worst"][:3]
    ]
    if rows:
        out.say()
        header = ("", "first token, s", "longest gap, s", "end to end, s")
        out.table("the slowest to begin", header, rows)
