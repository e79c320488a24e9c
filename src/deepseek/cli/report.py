"""Reports: one HTML file with everything in it, plots included."""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.output import labels, number, spread
from deepseek.errors import missing_extra
from deepseek.records import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A bar chart: figures of one kind side by side."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    unit: str
    limit: float | None = None
    """A line that the bars must stay under."""
    is_log: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """One or more lines over the same axis."""

    title: str
    across: str
    """What the axis counts."""
    unit: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """Places and values of each line, by its name."""
    borders: tuple[float, ...] = ()
    """Places that a dashed line marks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """What a step gives: words, measurements, charts, and whether what it checks holds."""

    title: str
    words: str
    measurements: tuple[Measurement, ...] = ()
    charts: tuple[Chart | Curves, ...] = ()
    failure: str | None = None
    """What was checked and does not hold."""


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
pre { white-space: pre-wrap; background: #f5f5f5; padding: .8rem; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; vertical-align:
top; } td.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.failed { color: #b00020; font-weight: 600; } .held { color: #176f2c; }
td:last-child { font-size: .8rem; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #16181c; }
  pre { background: #23262b; } td, th { border-color: #3a3d42; } svg { background: #fff; } }
"""


def write_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the sections as one HTML page that needs nothing beside it."""
    body = "\n".join(_section(section) for section in sections)
    path.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.failure is not None:
        parts.append(f"<p class='failed'>does not hold: {html.escape(section.failure)}</p>")
    parts.append(f"<pre>{html.escape(section.words)}</pre>")
    parts += [draw(chart) for chart in section.charts]
    if section.measurements:
        parts.append(_table(section.measurements))
    return "\n".join(parts)


def _table(measurements: Sequence[Measurement]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td class='figure'>{number(item.value)}</td>"
        f"<td class='figure'>{html.escape(spread(item))}</td><td>{html.escape(item.unit)}</td>"
        f"<td>{html.escape(_conditions(item))}</td></tr>"
        for name, item in zip(labels(measurements), measurements, strict=True)
    ]
    head = "".join(
        f"<th>{name}</th>" for name in ("measurement", "value", "spread", "unit", "under")
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _conditions(item: Measurement) -> str:
    return ", ".join(f"{name} {value}" for name, value in item.conditions.items())


def draw(chart: Chart | Curves) -> str:
    """Return a chart as an SVG element.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report", "to draw the report's plots") from error
    height = 0.6 + 0.42 * len(chart.labels) if isinstance(chart, Chart) else 3.2
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    if isinstance(chart, Chart):
        _draw_bars(axes, chart)
    else:
        _draw_lines(axes, chart)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(chart.title, loc="left", fontsize=10)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def _draw_bars(axes: Axes, chart: Chart) -> None:
    places = range(len(chart.labels))
    bars = axes.barh(places, chart.values, color="#3b6ea5", height=0.6)
    axes.set_yticks(places, chart.labels)
    axes.invert_yaxis()
    axes.bar_label(bars, [f"{number(value)} {chart.unit}" for value in chart.values], padding=3)
    if chart.is_log:
        axes.set_xscale("log")
    if chart.limit is not None:
        axes.axvline(chart.limit, color="#b00020", linestyle="--")
    axes.margins(x=0.18)


def _draw_lines(axes: Axes, chart: Curves) -> None:
    for name, (places, values) in chart.lines.items():
        axes.plot(places, values, label=name, linewidth=1.2)
    for place in chart.borders:
        axes.axvline(place, color="#999", linestyle="--", linewidth=0.8)
    axes.set_xlabel(chart.across)
    axes.set_ylabel(chart.unit)
    if len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
