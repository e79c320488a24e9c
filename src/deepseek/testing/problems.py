"""Numbers to try a kernel of the linear product with, and how far its results may lie.

Legend: M rows, K input channels, N output channels, G groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.choice import Case
from deepseek.ops.linear.reference import round_inputs, round_int4, round_int8
from deepseek.ops.quantized import rotate
from deepseek.ops.scheme import scaled_together, stored_width

_HAIR = 2e-6
"""Relative: what the order of sums makes of the largest weight of a group."""
_SUMS = 1e-5
"""Error of a float32 sum in any order, as a share of the sum of its terms' sizes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Inputs [M, K], weight [N, K] and bias [N], float32 on the CPU."""

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    is_on_grid: bool = False
    """int4 holds these inputs and weights exactly: no rounding is left to choose."""


def draw(case: Case, shape: tuple[int, int, int], seed: int) -> Problem:
    """Return a problem with an outlying channel, uneven weights, and a row of zeros in each.

    Args:
        case: int4 gets numbers on its grid with even seeds.
        shape: M, N and K.
        seed: odd ones give strided tensors and no bias.
    """
    generator = torch.Generator().manual_seed(seed)
    is_on_grid = case.storage == "int4" and seed % 2 == 0
    make = _on_grid if is_on_grid else _anywhere
    inputs, weight = make(shape, case.group, generator)
    inputs[1:2], weight[2:3] = 0, 0
    if seed % 2:
        return Problem(inputs.T.contiguous().T, weight.T.contiguous().T, None)
    bias = torch.randn(shape[1], generator=generator)
    return Problem(inputs, weight, bias, is_on_grid)


def _anywhere(
    shape: tuple[int, int, int], _: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    rows, columns, width = shape
    inputs = torch.randn(rows, width, generator=generator)
    inputs[:, width // 2] *= 20
    weight = torch.randn(columns, width, generator=generator)
    return inputs, weight * (0.1 + 3 * torch.rand(columns, 1, generator=generator))


def _on_grid(
    shape: tuple[int, int, int], group: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return whole levels times a power of two that differs from group to group; every group has
    its first and its last level, and zero, so that padding lies on the grid too."""
    rows, columns, width = shape
    group = group or width
    groups = -(-width // group)
    inputs = torch.randint(-127, 128, (rows, groups, group), generator=generator)
    inputs[..., 0] = 127
    levels = torch.randint(0, 16, (columns, groups, group), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15
    levels = levels - torch.randint(0, 16, (columns, groups, 1), generator=generator)
    scales = [torch.randint(-6, 0, (n, groups, 1), generator=generator) for n in (rows, columns)]
    inputs, weight = (
        each * 2.0**scale for each, scale in zip((inputs, levels), scales, strict=True)
    )
    return inputs.flatten(1)[:, :width], weight.flatten(1)[:, :width]


def error_bound(problem: Problem, case: Case) -> Tensor:
    """Return how far each output may lie from `linear_reference`, [M, N].

    float32, and numbers on the grid: the order of sums. bfloat16: also the rounding of the output.
    int8 and int4: also one level of an input and one of a weight, which may lie in the middle
    between two and go either way; so may a scale between two numbers of float16, and with it the
    weights of its group. A narrow input, padded and rotated, has each number several times, and
    all of them may lie in the middle.
    """
    inputs, weight = problem.inputs, problem.weight
    width = stored_width(case.storage, inputs.shape[-1], case.group)
    group = scaled_together(case.storage, case.group) or width
    undecided, inputs_undecided = torch.zeros_like(weight), torch.zeros_like(inputs)
    if case.storage == "bfloat16":
        inputs, weight = inputs.bfloat16().float(), weight.bfloat16().float()
    elif case.storage == "int8":
        inputs, weight = (rotate(_padded(each, case)) for each in (inputs, weight))
        undecided = _undecided(weight, round_int8, group)
        inputs_undecided = _undecided(inputs, round_inputs, group)
        inputs, weight = round_inputs(inputs, group), round_int8(weight, group)
    elif case.storage == "int4":
        inputs, weight = (_padded(each, case) for each in (inputs, weight))
        undecided = _undecided(weight, round_int4, group)
        inputs_undecided = _undecided(inputs, round_inputs, group)
        inputs, weight = round_inputs(inputs, group), round_int4(weight, group)
    bound = inputs.abs() @ weight.abs().T
    bound = _SUMS * (bound if problem.bias is None else bound + problem.bias.abs())
    if case.storage == "bfloat16":
        return bound + 2**-8 * (inputs @ weight.T).abs()
    if case.storage == "float32" or problem.is_on_grid:
        return bound
    level = 1 / 127 + (1 / 127 if case.storage == "int8" else 2 / 15)
    sizes = _largest(inputs, group)[:, None] * _largest(weight, group)
    either_way = inputs.abs() @ undecided.T + inputs_undecided @ weight.abs().T
    return bound + level * sizes.amax(-1) + either_way


def _undecided(values: Tensor, rounded: Callable[[Tensor, int], Tensor], group: int) -> Tensor:
    """Return how far rounded numbers lie apart when all are a hair larger or smaller, [N, K]."""
    return (rounded(values * (1 + _HAIR), group) - rounded(values * (1 - _HAIR), group)).abs()


def _padded(states: Tensor, case: Case) -> Tensor:
    width = states.shape[-1]
    return F.pad(states, (0, stored_width(case.storage, width, case.group) - width))


def _largest(values: Tensor, group: int) -> Tensor:
    """Return the largest size in each group, [rows, G]."""
    return values.unflatten(-1, (-1, group)).abs().amax(-1)
