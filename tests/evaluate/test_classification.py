"""Accuracy of a classifier, and two compared on the same texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from deepseek.data import LabelledText
from deepseek.errors import ConfigError
from deepseek.evaluate import accuracy, compare_accuracy
from deepseek.evaluate.classification import difference_interval, exact_mcnemar
from deepseek.evaluate.intervals import wilson

TEXTS = [LabelledText(str(number), str(number % 3)) for number in range(600)]


def test_accuracy_counts_and_says_how_sure_it_is() -> None:
    shares: list[float] = []
    result = accuracy(
        lambda texts: [str(int(text) % 3) if int(text) % 5 else "?" for text in texts],
        TEXTS,
        conditions={"scheme": "int8"},
        command="repeat it",
        progress=lambda _, share: shares.append(share or 0.0),
    )
    (measurement,) = result.measurements
    assert measurement.value == 480 / 600 == sum(result.is_right) / 600
    assert measurement.spread == wilson(480, 600)
    assert measurement.conditions["items"] == 600 and measurement.conditions["scheme"] == "int8"
    assert measurement.command == "repeat it"
    assert shares == [256 / 600, 512 / 600, 1.0]
    assert not result.is_right[0] and result.is_right[1]
    other = accuracy(lambda texts: ["0"] * len(texts), TEXTS[:-1])
    assert (
        other.measurements[0].conditions["items_sha256"] != measurement.conditions["items_sha256"]
    )


def test_no_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match="texts of accuracy"):
        accuracy(lambda texts: texts, [])
    for first, second in (([], []), ([True], [True, False])):
        with pytest.raises(ConfigError, match="texts of compare_accuracy"):
            compare_accuracy(first, second)


def paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], ...]:
    cells = ((True, True, both), (True, False, only_first), (False, True, only_second))
    rows = [(a, b) for a, b, count in (*cells, (False, False, neither)) for _ in range(count)]
    return [a for a, _ in rows], [b for _, b in rows]


def test_the_interval_of_the_difference() -> None:
    """Newcombe 1998, table II: cells 36, 12, 2, 0 by method 10; there it is first less second."""
    found = compare_accuracy(*paired(36, 12, 2, 0))
    assert (-found.spread.high, -found.spread.low) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert found.spread.kind == "ci95" and found.p_value == pytest.approx(0.01294, abs=1e-5)


@given(*(st.integers(0, 40) for _ in range(4)))
def test_a_comparison_holds_together(a: int, b: int, c: int, d: int) -> None:
    if a + b + c + d == 0:
        return
    first, second = paired(a, b, c, d)
    found, back = compare_accuracy(first, second), compare_accuracy(second, first)
    assert (found.only_first, found.only_second) == (b, c)
    assert found.difference == pytest.approx((c - b) / (a + b + c + d))
    assert found.spread.low - 1e-12 <= found.difference <= found.spread.high + 1e-12
    assert found.spread.low == pytest.approx(-back.spread.high, abs=1e-12)
    assert found.p_value == back.p_value
    if a + b:
        assert found.kept == pytest.approx((a + c) / (a + b))
    else:
        assert math.isnan(found.kept)
    assert (found.kept_spread is None) == (a + b < 20)
    if found.kept_spread is not None:
        assert found.kept_spread.low <= found.kept <= found.kept_spread.high


def test_mcnemar_is_the_sign_test() -> None:
    for one, other in ((0, 0), (5, 5), (1, 9), (12, 2), (40, 71), (300, 250)):
        wanted = binomtest(one, one + other).pvalue if one + other else 1.0
        assert exact_mcnemar(one, other) == pytest.approx(wanted, rel=1e-9)


def test_the_interval_covers() -> None:
    """Of samples from a known table about 95 in 100 hold the true difference."""
    draw = np.random.default_rng(0)
    shares, hits = np.array([0.7, 0.12, 0.06, 0.12]), 0
    for cells in draw.multinomial(150, shares, size=600):
        spread = difference_interval(*np.array(paired(*cells.tolist()), float))
        hits += spread.low <= 0.06 - 0.12 <= spread.high
    assert 0.93 <= hits / 600 <= 0.985
