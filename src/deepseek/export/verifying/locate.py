"""Finds the first layer whose states are not the source's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deepseek.export.formats import Reader
from deepseek.export.verifying.cases import Case

JUMP = 5.0
"""Rounding grows slowly from layer to layer: a difference that is so many times the one before is
not its work."""


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a case departs."""

    words: str
    layer: int | None = None
    """The first layer whose states depart, from 0; None where none does or nothing is known."""
    differences: tuple[float, ...] = ()
    """Behind each layer: the largest difference of a position's states, as a share of their
    length."""


def locate(case: Case, source: Reader, reader: Reader, noise: float) -> Location:
    """Return the first layer whose states depart on a case that fails.

    Layers are seen in one pass. Where a case fails only in pieces, or only in a batch, they agree,
    and what the case cannot do without is named.

    Args:
        case: one that fails.
        source: the side that is trusted.
        reader: of the export.
        noise: what rounding makes of a layer's states, as a share of their length.
    """
    ids, mask = case.arrays()
    theirs = reader.layers(ids, mask)
    if theirs is None:
        return Location(f"{reader.name} shows no layers")
    ours = source.layers(ids, mask)
    assert ours is not None
    if len(ours) != len(theirs):
        return Location(f"{len(theirs)} layers where the source has {len(ours)}")
    pairs = zip(ours, theirs, strict=True)
    found = tuple(_difference(one, other, mask.astype(bool)) for one, other in pairs)
    layer = _first(found, noise)
    if layer is not None:
        part = "the embedding or layer 0" if layer == 0 else f"layer {layer}"
        if layer == len(found) - 1:
            part += ", or the norm behind it"
        return Location(f"{part} of {len(found)}", layer, found)
    return Location(_elsewhere(case), None, found)


def _elsewhere(case: Case) -> str:
    """Return what is left where every layer's states agree: what the smallest case cannot do
    without."""
    needs = []
    if case.steps:
        needs.append("reading on through the cache")
    if len(case.rows) > 1:
        needs.append(f"a batch of {len(case.rows)} rows")
    if case.width > min(map(len, case.rows)):
        needs.append(f"padding on the {case.side}")
    if needs:
        return f"in no layer's pass over the whole text: it takes {' and '.join(needs)}"
    return "behind the last layer: the head"


def _difference(
    expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]
) -> float:
    if expected.shape != found.shape:
        return math.inf
    one, other = expected[mask].astype(np.float64), found[mask].astype(np.float64)
    away = np.linalg.norm(other - one, axis=1)
    share = away / np.maximum(np.linalg.norm(one, axis=1), 1e-12)
    return float(share.max()) if np.isfinite(share).all() else math.inf


def _first(differences: Sequence[float], noise: float) -> int | None:
    """Return where the differences jump out of what rounding makes: the first such place."""
    before = noise
    for layer, found in enumerate(differences):
        if not found <= JUMP * before:
            return layer
        before = max(before, found)
    return None
