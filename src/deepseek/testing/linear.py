"""What a kernel of the linear product must hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deepseek.ops.choice import Linear
from deepseek.ops.linear.reference import linear_reference
from deepseek.ops.scheme import Storage
from deepseek.testing.problems import Problem, draw, error_bound
from deepseek.testing.proof import Trial

SHAPES = (
    (1, 1, 1),
    (1, 130, 97),
    (2, 3, 5),
    (3, 48, 64),
    (5, 50, 33),
    (7, 17, 130),
    (8, 100, 200),
    (16, 49, 63),
    (17, 150, 65),
    (33, 31, 129),
    (33, 96, 257),
)
"""Rows, output and input channels: few of them a multiple of anything."""
_GRADIENTS: Mapping[Storage, float] = {"float32": 1e-5, "bfloat16": 2**-6}
"""Error of a gradient, as a share of the sum of its terms' sizes. The reference of integer weights
rounds, and has no gradients to compare with."""


def prove_linear(trial: Trial, shape: tuple[int, int, int], seed: int) -> tuple[float, bool]:
    """Return the largest share of the error allowed, and whether rows had the same bits apart.

    Args:
        trial: the kernel.
        shape: rows, output and input channels.
        seed: of the numbers, as in `draw`.

    Raises:
        VerifyError: the kernel breaks its contract.
    """
    trial = trial.of(f"inputs [{shape[0]}, {shape[2]}], weight [{shape[1]}, {shape[2]}]")
    case, linear = trial.case, trial.kernel.linear
    if linear is None:
        trial.fail("linear", "given, so that it can be proved", None)
    problem = draw(case, shape, seed)
    inputs, weight = problem.inputs.to(case.device), problem.weight.to(case.device)
    bias = None if problem.bias is None else problem.bias.to(case.device)
    expected = linear_reference(
        problem.inputs, problem.weight, case.storage, group=case.group, bias=problem.bias
    )
    bound = error_bound(problem, case)
    product = trial.call(linear, weight, bias)
    whole = trial.result(product, inputs, shape=expected.shape)
    share, kept = trial.share("output", whole, expected, bound), whole.detach().clone()
    is_same = True
    # the last row comes last: in memory that is used again it takes another row's place
    for part in (slice((shape[0] + 1) // 2), slice(-1, None)):
        alone = trial.result(product, inputs[part], shape=expected[part].shape)
        share = max(share, trial.share("output of some rows", alone, expected[part], bound[part]))
        is_same = is_same and torch.equal(alone, kept[part])
    if not torch.equal(whole, kept):
        trial.fail("output", "left alone by the next call", "changed values")
    trial.of_nothing(product, inputs[:0])
    if case.has_gradients and case.storage in _GRADIENTS:
        share = max(share, _prove_gradients(trial, linear, problem))
    return share, is_same


def _prove_gradients(trial: Trial, linear: Linear, problem: Problem) -> float:
    """Return the largest share of the error allowed, of the gradients of all that was given."""
    tensors = (problem.inputs, problem.weight, problem.bias)
    given = [each for each in tensors if each is not None]
    ours = [each.detach().to(trial.case.device).requires_grad_() for each in given]
    theirs = [each.detach().requires_grad_() for each in given]
    storage, bias = trial.case.storage, theirs[2] if len(theirs) == 3 else None
    expected = linear_reference(theirs[0], theirs[1], storage, bias=bias)
    found = trial.call(trial.call(linear, *ours[1:]), ours[0])
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(expected, theirs, direction)
    made = trial.gradients(found, ours, direction)
    sizes = direction.abs()
    terms = {
        "inputs": sizes @ problem.weight.abs(),
        "weight": sizes.T @ problem.inputs.abs(),
        "bias": sizes.sum(0),
    }
    return max(
        trial.share(f"gradient of {name}", made[place], wanted[place], _GRADIENTS[storage] * bound)
        for place, (name, bound) in enumerate(list(terms.items())[: len(given)])
    )
