"""Column-by-column rounding against its plain form, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek.compress.quantize.gptq import gptq
from deepseek.compress.quantize.grid import Grid, fit, output_error, round_weight
from deepseek.ops.quantized import rotate
from tests.compress.small import skewed_gram

GRIDS = [Grid(4, 32, False), Grid(4, 32, True), Grid(8, None, True), Grid(4, None, False)]


def plain(weight: Tensor, grid: Grid, gram: Tensor, damping: float, order: Tensor) -> Tensor:
    """Return codes [N, K] as the source's equations 2 and 3 say it, in double precision: the
    inverse of what is left of the damped gram gives what a column's error does to the rest.
    """
    scales = fit(weight, grid, gram)
    width = grid.width_of(weight.shape[1])
    scale = scales.scale.repeat_interleave(width, 1).double()
    zero = scales.zero.repeat_interleave(width, 1).double()
    gram = gram.double() + torch.eye(len(gram)) * damping * gram.diagonal().mean()
    work, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for place in range(len(order)):
        left = order[place:]
        inverse = torch.linalg.inv(gram[left][:, left])
        column = order[place]
        code = (work[:, column] / scale[:, column]).round() + zero[:, column]
        codes[:, column] = code.clamp(grid.bottom, grid.top)
        value = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (work[:, column] - value) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("by_size", [True, False])
def test_it_computes_what_the_source_says(grid: Grid, by_size: bool) -> None:
    torch.manual_seed(1)
    weight, gram = torch.randn(6, 160), skewed_gram(160)
    made = gptq(weight, grid, gram, damping=0.01, by_size=by_size)
    size = gram.diagonal().argsort(descending=True)
    order = size if by_size else torch.arange(160)
    same = (made.weight.codes == plain(weight, grid, gram, 0.01, order)).double().mean()
    assert same > 0.995  # a number between two codes may fall to either side


@pytest.mark.parametrize("grid", GRIDS)
def test_outputs_change_less_than_by_rounding_to_the_nearest(grid: Grid) -> None:
    torch.manual_seed(2)
    weight, gram = torch.randn(64, 128), skewed_gram(128)
    errors = [
        output_error(weight, made.values(), gram)
        for made in (gptq(weight, grid, gram).weight, round_weight(weight, grid, gram))
    ]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_are_the_nearest_to_the_latent_numbers(grid: Grid) -> None:
    weight, gram = torch.randn(8, 96), skewed_gram(96)
    made = gptq(weight, grid, gram)
    width = grid.width_of(96)
    scale = made.weight.scale.repeat_interleave(width, 1)
    zero = made.weight.zero.float().repeat_interleave(width, 1)
    codes = ((made.latent / scale).round() + zero).clamp(grid.bottom, grid.top)
    assert torch.equal(codes, made.weight.codes.float())


def test_inputs_that_are_always_zero_and_too_few_samples_are_borne() -> None:
    inputs = torch.randn(5, 64)
    inputs[:, 10:20] = 0
    made = gptq(torch.randn(4, 64), Grid(4, 32, False), inputs.T @ inputs, damping=1e-9)
    assert bool(made.weight.values().isfinite().all())
    nothing = gptq(torch.randn(4, 64), Grid(4, 32, False), torch.zeros(64, 64))
    assert bool(nothing.weight.values().isfinite().all())


@pytest.mark.parametrize("group", [64, None])
def test_a_rotated_weight_is_rounded_behind_the_rotation(group: int | None) -> None:
    torch.manual_seed(0)
    weight, gram = torch.randn(10, 128), skewed_gram(128, 1)
    grid, plain = Grid(8, group, True, rotated=True), Grid(8, group, True)
    turned, products = rotate(weight), rotate(rotate(gram).T)
    for made, expected in (
        (gptq(weight, grid, gram).weight, gptq(turned, plain, products).weight),
        (round_weight(weight, grid, gram), round_weight(turned, plain, products)),
        (round_weight(weight, grid), round_weight(turned, plain)),
    ):
        assert made.is_rotated
        assert not expected.is_rotated
        assert torch.equal(made.codes, expected.codes)
        assert torch.equal(made.scale, expected.scale)
        torch.testing.assert_close(made.values(), rotate(expected.values()))
        assert output_error(weight, made.values(), gram) < 1e-3


def test_a_width_of_no_whole_blocks_is_not_rotated() -> None:
    weight = torch.randn(3, 96)
    made = round_weight(weight, Grid(8, None, True, rotated=True))
    assert not made.is_rotated
    assert torch.equal(made.codes, round_weight(weight, Grid(8, None, True)).codes)
