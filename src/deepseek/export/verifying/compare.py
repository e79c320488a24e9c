"""How far answers may lie from the source's, and how far they do, position by position."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Floats, Kind
from deepseek.export.verifying.answers import Expected
from deepseek.export.verifying.cases import Case

ROWS_PER_SLICE = 256
"""Positions that are compared at a time, so that memory does not grow with the text."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What an export must keep of its source; None where nothing is asked.

    A difference is the largest of a position's answers, in standard deviations of the source's
    answers there: logits of one model spread twice as far as those of another, and so does
    rounding. Of encoders and classifiers it is in root mean squares.
    """

    name: str
    difference: float | None = None
    """Largest difference of a position."""
    typical: float | None = None
    """Median difference of all positions."""
    divergence: float | None = None
    """Mean KL(source || export) of a case, in nats a position."""
    mean_divergence: float | None = None
    """The same over all cases."""
    agreement: float | None = None
    """Share of all positions with the same likeliest token."""
    noise: float = 1e-5
    """What rounding makes of a layer's states, as a share of their length."""


TOLERANCES: dict[str, Tolerance] = {
    # SmolLM2 by ONNX Runtime lies 1.6e-5 (median) and 5e-5 (99 of 100 positions) from our modules;
    # norms whose eps is ten times too small 2e-3 to 5e-3 (median).
    "float32": Tolerance("float32", difference=1e-3, typical=1e-4),
    "float16": Tolerance(
        "float16", divergence=0.05, mean_divergence=1e-3, agreement=0.98, noise=1e-3
    ),
    "bfloat16": Tolerance(
        "bfloat16", divergence=0.3, mean_divergence=0.02, agreement=0.93, noise=1e-2
    ),
    "int8": Tolerance("int8", divergence=0.5, mean_divergence=0.05, agreement=0.9, noise=5e-2),
    "int4": Tolerance("int4", divergence=3.0, mean_divergence=0.5, agreement=0.65, noise=0.3),
}
"""By what the coarsest of the export's numbers are."""
SENSITIVE = 10.0
"""Where float32 itself is off, by so many times that an export may be off too. A few positions of a
thousand, those where a model's largest states arise, make 1e-3 and more out of a last bit."""
MOST_SENSITIVE = 10.0
"""… but by no more than so many times the tolerance."""


ENCODER = Tolerance("float32", difference=1e-4, typical=3e-5)
"""Of encoders and classifiers in float32, whose states are normed last: MiniLM's lie 4e-6 (median)
from themselves in float64, 1.4e-5 at worst; with the tanh form of gelu 7e-3."""


def tolerance_named(name: str, kind: Kind = "decoder") -> Tolerance:
    """Return a tolerance for models of a kind.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in TOLERANCES:
        must = f"one of {', '.join(TOLERANCES)}"
        raise ConfigError(describe("tolerance", "verify", must, name))
    return ENCODER if kind != "decoder" and name == "float32" else TOLERANCES[name]


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """The answers to a case beside the source's, all positions of all rows one behind another."""

    difference: Tensor
    """Largest of each position, in standard deviations of the source's answers; infinite where an
    answer is no number."""
    absolute: Tensor
    """Largest of each position, as it is."""
    divergence: Tensor
    """KL(source || export) in nats; empty for an encoder."""
    agreement: Tensor
    """Whether the largest is the same one; empty for an encoder."""
    chance: Tensor
    """By how much the chance of the source's likeliest differs; empty for an encoder."""
    places: tuple[tuple[int, int], ...]
    """Row and place of each position."""


def compare(
    case: Case, found: Sequence[Floats], expected: Expected, kind: Kind
) -> Comparison | str:
    """Return how far the answers to a case lie from the source's, or what is wrong with their
    shape."""
    parts: list[tuple[Tensor, ...]] = []
    places: list[tuple[int, int]] = []
    for number, (row, answer) in enumerate(zip(case.rows, found, strict=True)):
        wanted = expected[row]
        if answer.shape != wanted.shape:
            return f"answers {list(answer.shape)} where the source has {list(wanted.shape)}"
        for start in range(0, len(wanted), ROWS_PER_SLICE):
            stop = start + ROWS_PER_SLICE
            ours = torch.as_tensor(answer[start:stop]).float()
            parts.append(_rows(torch.as_tensor(wanted[start:stop]), ours, kind))
        places += [(number, place) for place in range(len(wanted))]
    difference, absolute, kl, agreement, chance = map(torch.cat, zip(*parts, strict=True))
    return Comparison(difference, absolute, kl, agreement, chance, tuple(places))


def _rows(expected: Tensor, found: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    away = (found - expected).abs().amax(dim=1)
    away = torch.where(away.isfinite(), away, math.inf)
    scale = expected.pow(2).mean(dim=1).sqrt()
    if kind == "decoder":
        scale = torch.maximum(expected.std(dim=1, correction=0), 1e-3 * scale)
    difference = away / scale.clamp(min=1e-6)
    if kind == "encoder":
        empty = torch.empty(0)
        return difference, away, empty, empty.bool(), empty
    theirs, ours = expected.log_softmax(dim=1), found.log_softmax(dim=1)
    chances = theirs.exp()
    kl = torch.where(chances == 0, 0.0, chances * (theirs - ours)).sum(dim=1, dtype=torch.float64)
    kl = torch.where(kl.isfinite(), kl.clamp(min=0.0), math.inf)
    top = expected.argmax(dim=1, keepdim=True)
    chance = (ours.gather(1, top).exp() - chances.gather(1, top)).squeeze(1)
    return difference, away, kl, top.squeeze(1) == found.argmax(dim=1), chance


@dataclasses.dataclass(frozen=True)
class Departure:
    """Where and how the answers to a case are not the source's."""

    words: str
    row: int | None = None
    """Of the first position that departs; None where the whole case does."""
    place: int | None = None
    """Of that position, counted from the row's first token."""


def judge(
    case: Case,
    found: Comparison | str,
    tolerance: Tolerance,
    off: Callable[[Tensor], Tensor],
) -> Departure | None:
    """Return why the answers to a case are not the source's, or None where they are.

    Args:
        case: what was asked.
        found: of `compare`.
        tolerance: what is allowed.
        off: given how far float32 must be off by itself at the positions that are a little beyond
            the tolerance, and 0 elsewhere, returns how far it is, as `Comparison.difference`.
    """
    if isinstance(found, str):
        return Departure(found)
    broken = ~found.difference.isfinite()
    if broken.any():
        return _at(found, broken, "not a number, or infinite")
    limit = tolerance.difference
    beyond = found.difference > (limit if limit is not None else math.inf)
    if limit is not None and beyond.any():
        if found.difference.max() <= MOST_SENSITIVE * limit:
            needed = torch.where(beyond, found.difference / SENSITIVE, 0.0)
            beyond &= off(needed) < needed
        if beyond.any():
            return _at(found, beyond, f"differs by more than {limit:g} standard deviations")
    if tolerance.divergence is not None and found.divergence.numel():
        mean = float(found.divergence.mean())
        if not mean <= tolerance.divergence:
            words = f"diverges by {mean:.3g} nats a position, at most {tolerance.divergence:g}"
            return Departure(words, *found.places[int(found.divergence.argmax())])
    return None


def _at(found: Comparison, beyond: Tensor, words: str) -> Departure:
    first = int(beyond.nonzero()[0])
    row, place = found.places[first]
    share = f"{int(beyond.sum())} of {len(beyond)} positions"
    return Departure(f"{words} in {share}, worst {float(found.difference.max()):.3g}", row, place)
