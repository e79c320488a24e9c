"""Grids: every number at its nearest code, ranges that lose little, numbers that formats hold."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deepseek.compress.quantize.grid import (
    Grid,
    fit,
    nearest,
    output_error,
    own_range,
    round_weight,
)
from deepseek.errors import ConfigError
from deepseek.ops.quantized import short_scale
from tests.compress.small import skewed_gram

GRIDS = st.builds(
    Grid,
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 8, 16]),
    symmetric=st.booleans(),
)
KINDS = ("normal", "positive", "negative", "zero", "tiny", "outlier")


def weight_of(kind: str, seed: int) -> torch.Tensor:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        weight[:, 3] *= 100
    return {
        "positive": weight.abs() + 1,
        "negative": -weight.abs() - 1,
        "zero": torch.zeros_like(weight),
        "tiny": weight * 1e-9,
    }.get(kind, weight)


@settings(max_examples=60, deadline=None)
@given(grid=GRIDS, kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_every_number_is_at_the_nearest_code_of_a_range_that_formats_hold(
    grid: Grid, kind: str, seed: int
) -> None:
    weight = weight_of(kind, seed)
    scales = fit(weight, grid)
    made = nearest(weight, grid, scales)
    assert int(made.codes.min()) >= grid.bottom
    assert int(made.codes.max()) <= grid.top
    assert torch.equal(made.scale, short_scale(made.scale))
    assert torch.equal(scales.zero, made.zero.float())
    if grid.symmetric:
        assert made.is_symmetric
    blocks = weight.unflatten(-1, (made.scale.shape[1], -1))[..., None]
    codes = torch.arange(grid.bottom, grid.top + 1)
    numbers = (codes - scales.zero[..., None, None]) * scales.scale[..., None, None]
    least = (numbers - blocks).abs().amin(-1).flatten(-2)
    torch.testing.assert_close((made.values() - weight).abs(), least, rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(grid=GRIDS, seed=st.integers(0, 1000), has_gram=st.booleans())
def test_a_searched_range_loses_no_more_than_the_whole_one(
    grid: Grid, seed: int, has_gram: bool
) -> None:
    weight = weight_of("outlier", seed)
    gram = skewed_gram(32, seed) if has_gram else None
    made = fit(weight, grid, gram), own_range(weight, grid)
    changes = [nearest(weight, grid, each).values() - weight for each in made]
    blocks = [each.unflatten(-1, (-1, grid.width_of(32))) for each in changes]
    if gram is None:
        ours, plain = (each.square().sum(-1) for each in blocks)
    else:
        width = grid.width_of(32)
        parts = [gram[at : at + width, at : at + width] for at in range(0, 32, width)]
        metric = torch.stack(parts)
        ours, plain = (torch.einsum("ngi,gij,ngj->ng", each, metric, each) for each in blocks)
    assert bool((ours <= plain * (1 + 1e-4) + 1e-9).all())


def test_the_search_finds_the_grid_that_a_weight_lies_on() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (6, 4, 16))
    codes[..., 0], codes[..., 1] = 0, 15
    scale, zero = short_scale(torch.rand(6, 4, 1) + 0.1), torch.randint(0, 16, (6, 4, 1))
    weight = ((codes - zero) * scale).flatten(-2)
    assert torch.equal(round_weight(weight, Grid(4, 16, False)).values(), weight)


def test_wide_groups_weigh_by_the_inputs_sizes() -> None:
    weight, gram = torch.randn(8, 160), torch.eye(160)
    gram[3, 3] = 1e5
    grid = Grid(4, None, True)
    ours, plain = round_weight(weight, grid, gram), round_weight(weight, grid)
    assert output_error(weight, ours.values(), gram) < output_error(weight, plain.values(), gram)


def test_the_output_error_is_that_of_the_outputs() -> None:
    inputs, weight, other = torch.randn(50, 12), torch.randn(7, 12), torch.randn(7, 12)
    gram = inputs.T @ inputs / 50
    expected = (inputs @ (other - weight).T).square().sum() / (inputs @ weight.T).square().sum()
    assert output_error(weight, other, gram) == pytest.approx(float(expected), rel=1e-4)


def test_symmetric_codes_of_eight_bits_all_have_a_negative() -> None:
    weight = -torch.rand(20, 64) - torch.eye(20, 64) * 3
    codes = round_weight(weight, Grid(8, None, True)).codes.int() - 128
    assert int(codes.min()) >= -127


def test_a_group_that_does_not_divide_a_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="divisor of the 48 channels"):
        fit(torch.zeros(2, 48), Grid(4, 32, False))
