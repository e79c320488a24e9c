"""What counts as a departure: scale, numbers that are none, and where float32 itself is off."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import numpy as np
import pytest
import torch

from benchmarks.planted_bugs import usual_bugs
from deepseek.errors import ConfigError, VerifyError
from deepseek.export import verify
from deepseek.export.formats import Floats, Ids
from deepseek.export.verifying.answers import ask, expect
from deepseek.export.verifying.cases import Case
from deepseek.export.verifying.compare import (
    MOST_SENSITIVE,
    Comparison,
    Departure,
    Tolerance,
    compare,
    judge,
    tolerance_named,
)
from deepseek.export.verifying.source import JitteredReader, ModelReader
from deepseek.models.layers import Attention
from tests.export.verifying.small import small_decoder

CASE = Case(id="a", kind="b", rows=((1, 2, 3), (4,)))
SHARP = 40.0
NAMED = tolerance_named("float32")


def answers(scale: float = 1.0) -> dict[tuple[int, ...], Floats]:
    """Return what a source answers for the rows of the case."""
    draw = np.random.default_rng(0)
    return {row: (scale * draw.normal(size=(len(row), 50))).astype(np.float32) for row in CASE.rows}


def departs(change: float, scale: float = 1.0, off: float = 0.0) -> Departure | None:
    """Judge answers that are off at the second position of the first row."""
    expected = answers(scale)
    found = [expected[row].copy() for row in CASE.rows]
    found[0][1, 7] += change
    compared = compare(CASE, found, expected, "decoder")
    return judge(CASE, compared, NAMED, lambda needed: off * (needed > 0))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_differences_are_judged_by_the_spread_of_the_answers(scale: float) -> None:
    assert departs(5e-4 * scale, scale) is None
    found = departs(5e-3 * scale, scale)
    assert found is not None
    assert (found.row, found.place) == (0, 1)
    assert "1 of 4 positions" in found.words


def test_where_float32_is_off_the_export_may_be_too_but_not_by_much() -> None:
    assert departs(5e-3) is not None
    assert departs(5e-3, off=1e-3) is None
    assert departs(5e-3, off=1e-4) is not None
    assert departs(MOST_SENSITIVE * 2e-3, off=1.0) is not None


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_departs_under_every_tolerance(number: float) -> None:
    expected = answers()
    found = [expected[row].copy() for row in CASE.rows]
    found[1][0, 3] = number
    compared = compare(CASE, found, expected, "decoder")
    for name in ("float32", "bfloat16", "int4"):
        departure = judge(CASE, compared, tolerance_named(name), torch.zeros_like)
        assert departure is not None
        assert (departure.row, departure.place) == (1, 0)


def test_divergence_is_that_of_the_definition() -> None:
    expected = answers()
    found = [expected[row] * np.float32(1.1) for row in CASE.rows]
    compared = compare(CASE, found, expected, "decoder")
    assert isinstance(compared, Comparison)
    one = torch.from_numpy(np.concatenate([expected[row] for row in CASE.rows])).double()
    other = torch.from_numpy(np.concatenate(found)).double()
    kl = (one.softmax(1) * (one.log_softmax(1) - other.log_softmax(1))).sum(1)
    torch.testing.assert_close(compared.divergence, kl, rtol=1e-3, atol=1e-7)
    assert compared.agreement.all()
    allowed = Tolerance("test", divergence=float(kl.mean()) * 1.1)
    assert judge(CASE, compared, allowed, torch.zeros_like) is None
    strict = Tolerance("test", divergence=float(kl.mean()) * 0.9)
    assert judge(CASE, compared, strict, torch.zeros_like) is not None


def test_another_width_departs() -> None:
    expected = answers()
    found = [np.zeros((len(row), 51), np.float32) for row in CASE.rows]
    words = compare(CASE, found, expected, "decoder")
    assert isinstance(words, str)
    assert words == "answers [3, 51] where the source has [3, 50]"
    assert judge(CASE, words, NAMED, torch.zeros_like) == Departure(words)


def test_answers_of_another_shape_are_told() -> None:
    class Short(ModelReader):
        def forward(self, ids: Ids, mask: Ids) -> Floats:
            return super().forward(ids, mask)[:, 1:]

    with pytest.raises(VerifyError, match=r"answer of deepseek float32 must be of the shape"):
        ask(Short(small_decoder()), CASE)


def test_padding_pieces_and_batches_change_nothing_of_the_source() -> None:
    reader = ModelReader(small_decoder())
    expected = expect(reader, [CASE, Case(id="b", kind="b", rows=((5, 6, 7), (8, 9, 1)))])
    asked = [
        CASE,
        Case(id="a", kind="b", rows=CASE.rows, side="left", extra=3, filler=9),
        Case(id="b", kind="b", rows=((5, 6, 7), (8, 9, 1)), steps=(1, 2)),
        Case(id="b", kind="b", rows=((5, 6, 7), (8, 9, 1)), steps=(2, 1), forks=True),
    ]
    for case in asked:
        compared = compare(case, ask(reader, case), expected, "decoder")
        assert isinstance(compared, Comparison)
        assert compared.difference.max() < 1e-4
        assert compared.places[-1] == (1, len(case.rows[1]) - 1)


def test_an_unknown_tolerance_is_refused() -> None:
    with pytest.raises(ConfigError, match="tolerance of verify must be one of float32"):
        tolerance_named("float3")
    assert tolerance_named("float32", "encoder").difference == 1e-4


def test_where_rounding_matters_is_found_by_drawing_the_last_bit_anew() -> None:
    """Scores of thousands turn a last bit into much: an export that does so too holds, and one
    that is wrong does not."""
    model = small_decoder()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = cast(Attention, layer.self_attn)
            attention.q_proj.weight *= SHARP
            attention.k_proj.weight *= SHARP
    found = verify(model, JitteredReader(model, 99), cases=60)
    assert found.holds
    assert found.positions.difference.max() > 1.5e-3
    unaware = dataclasses.replace(NAMED, difference=found.positions.difference.max() / 11)
    assert verify(model, JitteredReader(model, 99), cases=60, tolerance=unaware).departed
    wrong = next(bug for bug in usual_bugs(model, 64) if bug.name == "embedding row 0 wrong")
    assert verify(model, wrong.plant(model), cases=60).departed


def test_a_jittered_reader_is_the_same_every_time_and_leaves_the_model() -> None:
    model = small_decoder()
    ids = np.array([[7, 250, 40, 41]])
    plain = ModelReader(model).forward(ids, ids)
    first, again = (JitteredReader(model, 1).forward(ids, ids) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, plain)
    assert np.array_equal(ModelReader(model).forward(ids, ids), plain)
    np.testing.assert_allclose(first, plain, atol=1e-4)
