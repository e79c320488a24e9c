"""Plots as SVG, drawn without a library: strips of points, and lines, both over a log axis."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 260, 64, 28, 44
_COLOURS = ("#3b6ea5", "#c26a1b", "#4a8c4a")
_LIMIT = "#b00020"
_SMALLEST = 1e-12


@dataclasses.dataclass(frozen=True)
class Strip:
    """Values of one kind, a point each."""

    name: str
    values: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Line:
    """Values along an axis."""

    name: str
    places: Sequence[float]
    values: Sequence[float]


def strips(title: str, shown: Sequence[Strip], limit: float | None = None) -> str:
    """Return a plot of kinds side by side; what is not finite stands at the upper edge, in red."""
    values = [value for strip in shown for value in strip.values]
    scale = _Scale.of([*values, *([] if limit is None else [limit])])
    step = (_WIDTH - _LEFT - 10) / max(1, len(shown))
    parts = [_frame(title, scale)]
    for number, strip in enumerate(shown):
        centre = _LEFT + (number + 0.5) * step
        parts.append(_label(centre, _HEIGHT - _BOTTOM + 16, strip.name))
        for index, value in enumerate(strip.values):
            across = centre + ((index * 0.618034) % 1 - 0.5) * 0.7 * step
            is_bad = not math.isfinite(value) or (limit is not None and value > limit)
            colour = _LIMIT if is_bad else _COLOURS[0]
            parts.append(
                f"<circle cx='{across:.1f}' cy='{scale.at(value):.1f}' r='2' fill='{colour}' "
                "fill-opacity='.6'/>"
            )
    if limit is not None:
        height = scale.at(limit)
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{height:.1f}' y2='{height:.1f}' "
            f"stroke='{_LIMIT}' stroke-dasharray='5 4'/>"
        )
    return _svg(parts)


def lines(
    title: str, across: str, shown: Sequence[Line], *, names: Sequence[str] | None = None
) -> str:
    """Return a plot of lines over one axis.

    Args:
        title: what is shown, with its unit.
        across: what the axis counts.
        shown: at least one line with at least one value.
        names: of the places 0, 1, …, where they are no numbers.
    """
    scale = _Scale.of([value for line in shown for value in line.values])
    most = max(max(line.places) for line in shown) or 1
    room = _WIDTH - _LEFT - 30

    def at(place: float) -> float:
        return _LEFT + 15 + place / most * room

    parts = [_frame(title, scale)]
    for number, line in enumerate(shown):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [
            f"{at(place):.1f},{scale.at(value):.1f}"
            for place, value in zip(line.places, line.values, strict=True)
        ]
        parts.append(
            f"<polyline points='{' '.join(points)}' fill='none' stroke='{colour}' "
            "stroke-width='1.6'/>"
        )
        parts += [
            f"<circle cx='{point.split(',')[0]}' cy='{point.split(',')[1]}' r='2.5' "
            f"fill='{colour}'/>"
            for point in points
        ]
        if len(shown) > 1:
            parts.append(_label(_WIDTH - 60, 18 + 16 * number, line.name, colour))
    shown_names = [*(names or [f"{place:g}" for place in shown[0].places])]
    every = max(1, len(shown_names) // 16)
    for number in range(0, len(shown_names), every):
        parts.append(_label(at(number), _HEIGHT - _BOTTOM + 16, shown_names[number]))
    parts.append(_label(_WIDTH / 2, _HEIGHT - 8, across))
    return _svg(parts)


@dataclasses.dataclass(frozen=True)
class _Scale:
    """A log axis upward, over whole decades."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        seen = [max(value, _SMALLEST) for value in values if math.isfinite(value)] or [1.0]
        low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
        return cls(low, max(high, low + 1))

    def at(self, value: float) -> float:
        """Return the height of a value in the picture."""
        if not math.isfinite(value):
            return _TOP
        share = (math.log10(max(value, 10.0**self.low)) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)


def _frame(title: str, scale: _Scale) -> str:
    parts = [f"<text x='4' y='16' font-size='13' font-weight='600'>{html.escape(title)}</text>"]
    every = max(1, (scale.high - scale.low) // 6)
    for decade in range(scale.low, scale.high + 1, every):
        height = scale.at(10.0**decade)
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{height:.1f}' y2='{height:.1f}' "
            f"stroke='#ddd'/><text x='{_LEFT - 6}' y='{height + 4:.1f}' font-size='11' "
            f"text-anchor='end'>1e{decade}</text>"
        )
    return "".join(parts)


def _label(across: float, height: float, text: str, colour: str = "#1a1a1a") -> str:
    return (
        f"<text x='{across:.1f}' y='{height:.1f}' font-size='11' text-anchor='middle' "
        f"fill='{colour}'>{html.escape(text)}</text>"
    )


def _svg(parts: Sequence[str]) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' "
        f"width='{_WIDTH}' height='{_HEIGHT}' font-family='system-ui, sans-serif' role='img'>"
        f"{''.join(parts)}</svg>"
    )
