"""Bytes and seconds by arithmetic: known cases, and the border where packing begins to pay."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.parallel import Job, estimate, pays_below, wire_bytes

MILLION = 1_000_000


def job(**changes: float) -> Job:
    values = {"num_values": 100 * MILLION, "workers": 4, "compute_s": 2.0}
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def test_bytes_of_known_cases() -> None:
    assert wire_bytes(MILLION, 1, "tree") == wire_bytes(MILLION, 1, "sparse24-float8") == 0
    # of two workers, pairs and a ring send the same
    assert wire_bytes(MILLION, 2, "tree") == wire_bytes(MILLION, 2, "ring") == 4 * MILLION
    assert wire_bytes(MILLION, 8, "tree") == 12 * MILLION
    assert wire_bytes(MILLION, 4, "ring-bfloat16") == 3 * MILLION
    assert wire_bytes(1024, 4, "sparse24-float8") == 2 * 3 * 161
    assert wire_bytes(1025, 4, "sparse24-float8") == 2 * 2 * 3 * 161


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_more_than_60_percent_less_than_16_bits(workers: int) -> None:
    many = 100 * MILLION
    packed, plain = (wire_bytes(many, workers, way) for way in ("sparse24-float8", "ring-bfloat16"))
    assert packed / plain == pytest.approx(161 / 512, rel=1e-3)
    assert wire_bytes(many, workers, "sparse24-bfloat16") / plain == pytest.approx(9 / 16, rel=1e-3)


def test_seconds_of_known_cases() -> None:
    plain = estimate(job(), "ring-bfloat16", 1.0)
    assert plain.num_bytes == 300 * MILLION and plain.codec_s == 0
    assert plain.step_s == pytest.approx(2.0 + 2.4)
    hidden = estimate(job(hidden_s=1.0), "ring-bfloat16", 1.0)
    assert hidden.step_s == pytest.approx(2.0 + 1.4)
    assert estimate(job(hidden_s=1.0), "ring-bfloat16", 100.0).step_s == 2.0
    packed = estimate(job(encode_s=1e-9, decode_s=2e-9), "sparse24-float8", math.inf)
    assert packed.codec_s == pytest.approx(0.1 + 2.5 * 0.2)
    assert packed.step_s == pytest.approx(2.0 + packed.codec_s)


def test_it_always_or_never_pays() -> None:
    assert pays_below(job(), "sparse24-float8", "tree") == math.inf
    assert pays_below(job(encode_s=1e-9), "sparse24-float8", "sparse24-float8") == 0.0
    assert pays_below(job(workers=1, encode_s=1e-9), "sparse24-float8", "tree") == 0.0


@given(
    workers=st.sampled_from([2, 4, 8, 64]),
    hidden_s=st.floats(0, 5),
    codec_s=st.floats(1e-10, 1e-7),
    other=st.sampled_from(["tree", "ring", "ring-bfloat16"]),
)
def test_at_the_border_both_take_as_long(
    workers: int, hidden_s: float, codec_s: float, other: str
) -> None:
    one = job(workers=workers, hidden_s=hidden_s, encode_s=codec_s, decode_s=codec_s)
    border = pays_below(one, "sparse24-float8", other)  # type: ignore[arg-type]

    def gain(speed: float) -> float:
        plain = estimate(one, other, speed)  # type: ignore[arg-type]
        return plain.step_s - estimate(one, "sparse24-float8", speed).step_s

    assert gain(border) == pytest.approx(0, abs=1e-6)
    assert gain(border * 0.9) > 0 > gain(border * 1.1)
