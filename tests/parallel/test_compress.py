"""Two of four in a byte each: the same as the plain way, and nothing lost that is not known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.parallel.compress import BLOCK, Codec, Values, read_back

KINDS: tuple[Values, ...] = ("float8", "bfloat16")
SHARE = {"float8": 2.0**-4, "bfloat16": 2.0**-8}
"""The most that a kept value is rounded by, as a share of it, for what is not tiny."""

floats = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40)


def sent(values: Tensor, kind: Values) -> Tensor:
    codec = Codec(kind)
    return codec.decode(codec.encode(values), torch.empty_like(values))


def spread(count: int, seed: int = 0) -> Tensor:
    """Return values of many magnitudes, among them zeros and equal ones."""
    torch.manual_seed(seed)
    values = torch.randn(count) * 10.0 ** torch.randint(-6, 6, (count,))
    values[torch.rand(count) < 0.1] = 0
    return torch.where(torch.rand(count) < 0.1, values.round(), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 4, 63, 255, 256, 257, 1000, 262_147])
def test_it_reads_back_what_the_plain_way_does(kind: Values, count: int) -> None:
    values = spread(count, seed=count)
    assert torch.equal(sent(values, kind), read_back(values, kind))


@given(values=floats, kind=st.sampled_from(KINDS))
def test_it_does_so_for_any_floats(values: list[float], kind: Values) -> None:
    given_ = torch.tensor(values)
    found, expected = sent(given_, kind), read_back(given_, kind)
    assert torch.equal(found.nan_to_num(1.5), expected.nan_to_num(1.5))


@given(count=st.integers(1, 700), kind=st.sampled_from(KINDS), power=st.integers(-60, 60))
def test_what_is_read_and_what_is_lost_are_the_value_exactly(
    count: int, kind: Values, power: int
) -> None:
    """Error feedback loses nothing: the error is itself a float32."""
    values = spread(count, seed=count) * 2.0**power
    read = sent(values, kind)
    lost = values - read
    assert torch.equal(lost.double(), values.double() - read.double())
    assert torch.equal(read + lost, values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_largest_of_four_are_kept_well(kind: Values) -> None:
    groups = torch.randn(3000, 4)
    read = sent(groups.flatten(), kind).view_as(groups)
    assert ((read != 0).sum(1) <= 2).all()
    kept = groups.abs() >= groups.abs().topk(2, dim=1).values[:, -1:]
    usual = kept & (groups.abs() > 2.0**-12)
    assert ((read - groups)[usual].abs() <= SHARE[kind] * groups[usual].abs()).all()
    # half of the values hold most of the square: 85 % of a normal distribution's
    assert 0.8 < (read.square().sum() / groups.square().sum()) < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Values) -> None:
    assert torch.equal(sent(torch.zeros(300), kind), torch.zeros(300))
    assert not sent(torch.full((300,), 1e-45), "float8").any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 5, 255, 256, 299])
def test_what_is_not_finite_stays_so(kind: Values, bad: float, place: int) -> None:
    values = torch.randn(300)
    values[place] = bad
    read = sent(values, kind)
    assert not read[place].isfinite()
    other_block = slice(256, 300) if place < BLOCK else slice(0, 256)
    assert read[other_block].isfinite().all()


@pytest.mark.parametrize("largest", [1.0, 1.75, 1.8, 1.8125, 1.874, 1.9375, 1.999])
def test_the_largest_of_a_block_never_overflows(largest: float) -> None:
    read = sent(torch.tensor([largest, 0.0, 0.0, 0.0]), "float8")
    assert read[0].item() == pytest.approx(largest, rel=SHARE["float8"])


@pytest.mark.parametrize(("kind", "bits"), [("float8", 161 / 32), ("bfloat16", 9.0)])
def test_bits_of_a_value(kind: Values, bits: float) -> None:
    count = 10 * BLOCK
    packed = Codec(kind).encode(torch.randn(count))
    assert packed.dtype == torch.uint8 and packed.shape == (10, Codec(kind).row_bytes)
    assert packed.nbytes * 8 / count == bits
    # two halves of four bits each and two places of two bits: 20 of bfloat16's 64 bits, and a scale
    assert bits < 0.4 * 16 or kind == "bfloat16"


def test_the_order_of_bytes_is_what_the_page_says() -> None:
    values = torch.zeros(256)
    values[4:8] = torch.tensor([0.5, -448.0, 0.0, 256.0])
    (row,) = Codec("float8").encode(values)
    read = row[:128].view(torch.float8_e4m3fn).float()
    assert (read[1], read[64 + 1]) == (-448.0, 256.0)
    assert int(row[128 + 1]) & 15 == 1 | 3 << 2
    assert int(row[160]) == 127 + 8
