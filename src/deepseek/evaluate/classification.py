"""Accuracy of a classifier of texts, and the paired comparison of two on the same texts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deepseek.data import LabelledText
from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import Condition, Progress
from deepseek.evaluate.intervals import FloatArray, bootstrap_ratio, wilson
from deepseek.records import Measurement, Spread

TEXTS_AT_ONCE = 256
_FEWEST_RIGHT = 20
"""Below, a resample may have none."""

Classify = Callable[[Sequence[str]], Sequence[str]]
"""Gives the label of each text: `Encoder.classify`, `EncoderEngine.classify`, or another."""


@dataclasses.dataclass(frozen=True)
class AccuracyResult:
    """What `accuracy` found."""

    measurements: list[Measurement]
    """`accuracy`."""
    is_right: tuple[bool, ...]
    """Of each text."""


def accuracy(
    classify: Classify,
    texts: Sequence[LabelledText],
    *,
    conditions: Mapping[str, Condition] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> AccuracyResult:
    """Measure the share of texts that get their own label.

    Args:
        classify: gives labels.
        texts: at least one.
        conditions: of the measurement, beside the number of texts and their hash.
        command: that repeats it.
        progress: called after every 256 texts.

    Returns:
        `accuracy` with a Wilson interval over the texts; and every text.

    Raises:
        ConfigError: no texts.
    """
    if not texts:
        raise ConfigError(describe("texts", "accuracy", "at least one", list(texts)))
    is_right: list[bool] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        found = classify([each.text for each in part])
        is_right += [label == each.label for label, each in zip(found, part, strict=True)]
        if progress is not None:
            progress("accuracy", len(is_right) / len(texts))
    measurement = Measurement(
        name="accuracy",
        value=sum(is_right) / len(texts),
        unit="1",
        spread=wilson(sum(is_right), len(texts)),
        conditions={
            **(conditions or {}),
            "items": len(texts),
            "items_sha256": _hash(texts),
            "interval": "Wilson over items",
        },
        command=command,
    )
    return AccuracyResult([measurement], tuple(is_right))


@dataclasses.dataclass(frozen=True)
class PairedAccuracy:
    """Two classifiers on the same texts."""

    only_first: int
    """Texts that the first alone has right."""
    only_second: int
    difference: float
    """Accuracy of the second less that of the first."""
    spread: Spread
    """95 % interval of the difference."""
    p_value: float
    """Of two classifiers that are right equally often: how likely they would differ so much."""
    kept: float
    """Accuracy of the second as a share of the first's; NaN where the first is never right."""
    kept_spread: Spread | None
    """95 % bootstrap interval over texts; None where the first has fewer than 20 right."""


def compare_accuracy(first: Sequence[bool], second: Sequence[bool]) -> PairedAccuracy:
    """Compare two classifiers text by text.

    Args:
        first, second: whether each has a text right; the same texts in the same order.

    Raises:
        ConfigError: no texts, or not the same number.

    Source: McNemar, Psychometrika 12 (1947), 153, in its exact form; `difference_interval`.
    """
    count = len(first)
    if not count or len(second) != count:
        got = f"{count} and {len(second)}"
        raise ConfigError(describe("texts", "compare_accuracy", "the same, at least one", got))
    ours, theirs = np.asarray(first, float), np.asarray(second, float)
    only_first = int((ours > theirs).sum())
    only_second = int((theirs > ours).sum())
    base = float(ours.sum())
    return PairedAccuracy(
        only_first,
        only_second,
        (only_second - only_first) / count,
        difference_interval(ours, theirs),
        exact_mcnemar(only_first, only_second),
        float(theirs.sum()) / base if base else math.nan,
        bootstrap_ratio(theirs, ours) if base >= _FEWEST_RIGHT else None,
    )


def exact_mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of the exact test of McNemar: the sign test of the texts on
    which two classifiers differ."""
    trials, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(trials, k) for k in range(fewer + 1))
    return float(min(1, 2 * tail / 2**trials)) if trials else 1.0


def difference_interval(first: FloatArray, second: FloatArray) -> Spread:
    """Return the 95 % interval of the second share of successes less the first, of paired trials.

    Args:
        first, second: 1 for a success, 0 for none: [trials].

    Source: Newcombe, Statistics in Medicine 17 (1998), 2635, method 10.
    """
    count = len(first)
    both = float((first * second).sum())
    neither = float(((1 - first) * (1 - second)).sum())
    left, right = float(((1 - second) * first).sum()), float(((1 - first) * second).sum())
    one, two = first.mean(), second.mean()
    a, b = wilson(first.sum(), count), wilson(second.sum(), count)
    product = (both + left) * (right + neither) * (both + right) * (left + neither)
    numerator = both * neither - left * right
    if numerator > count / 2:
        numerator -= count / 2
    elif numerator > 0:
        numerator = 0.0
    phi = numerator / math.sqrt(product) if product > 0 else 0.0
    low = _root(two - b.low, a.high - one, phi)
    high = _root(b.high - two, one - a.low, phi)
    difference = float(two - one)
    return Spread("ci95", max(-1.0, difference - low), min(1.0, difference + high))


def _root(one: float, two: float, phi: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * phi * one * two + two * two))


def _hash(texts: Sequence[LabelledText]) -> str:
    digest = hashlib.sha256()
    for each in texts:
        digest.update(json.dumps([each.text, each.label]).encode() + b"\n")
    return digest.hexdigest()
