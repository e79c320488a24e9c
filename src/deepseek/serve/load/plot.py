"""Latency, throughput and goodput over the load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepseek.records import Measurement
from deepseek.serve.load.summary import LATENCIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = ("first_token_s", "inter_token_s", "end_to_end_s")
"""The latencies that are drawn."""
STATISTICS = ("p50", "p95", "p99")
RATES = ("new_tokens_per_s", "goodput_share")


def draw_load(found: Sequence[Measurement]) -> Figure:
    """Draw latencies and rates over users, over requests a second, or, of a sweep that has both,
    over the requests that were answered in a second."""
    from matplotlib.figure import Figure

    across = _across(found)
    shown = [name for name in RATES if any(each.name == name for each in found)]
    figure = Figure(figsize=(4 * (len(PANELS) + len(shown)), 3.8), layout="tight")
    axes = figure.subplots(1, len(PANELS) + len(shown))
    for axis, name in zip(axes, (*PANELS, *shown), strict=True):
        for statistic in STATISTICS if name in PANELS else (None,):
            points = _points(found, name, statistic, across)
            _line(axis, points, statistic)
        unit = next((each.unit for each in found if each.name == name), "s")
        title = LATENCIES.get(name, name.replace("_per_s", "").replace("_", " "))
        axis.set(title=f"{title}, {'share' if unit == '1' else unit}", xlabel=across)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    return figure


def _line(axis: Axes, points: Sequence[tuple[float, float]], statistic: str | None) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=statistic)


def _across(found: Sequence[Measurement]) -> str:
    kinds = {kind for each in found for kind in ("concurrency", "rate") if kind in each.conditions}
    if len(kinds) == 2:
        return "requests answered a second"
    return "users at once" if kinds == {"concurrency"} else "requests a second"


def _points(
    found: Sequence[Measurement], name: str, statistic: str | None, across: str
) -> list[tuple[float, float]]:
    answered = {_load(each): each.value for each in found if each.name == "requests_per_s"}
    points = []
    for each in found:
        if each.name == name and each.conditions.get("statistic") == statistic:
            load = _load(each)
            place = answered.get(load, 0.0) if "answered" in across else load[1]
            points.append((place, each.value))
    return sorted(points)


def _load(each: Measurement) -> tuple[str, float]:
    kind = "concurrency" if "concurrency" in each.conditions else "rate"
    return kind, float(each.conditions[kind])
