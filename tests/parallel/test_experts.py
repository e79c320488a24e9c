"""Experts divided, tokens sent to them: losses, gradients and weights are those of one process."""

from __future__ import annotations

import pytest
import torch

from deepseek.parallel import Grid, Mesh, World, experts, splits
from tests.parallel.divided import Outcome, assert_each_differs, assert_each_same, train_each
from tests.parallel.worlds import in_processes
from tests.tolerances import assert_close

pytestmark = pytest.mark.dist

TWO = [("qwen3-moe", Mesh(expert=2)), ("deepseek-v3", Mesh(expert=2))]
FOUR = [
    ("deepseek-v3", Mesh(expert=4)),
    ("deepseek-v3", Mesh(data=2, expert=2)),
    ("qwen3-moe", Mesh(expert=2, tensor=2)),
]


class Scaled(torch.nn.Module):
    """Experts that multiply by a number each: what was computed where is seen at once."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = torch.nn.Parameter(torch.arange(1.0, 5.0)[:, None])

    def forward(
        self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return tokens * (self.factors[chosen, 0] * weights).sum(1, keepdim=True)


def nobody_comes(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Let every token go to the experts of the first process, which has no other work."""
    grid = Grid(Mesh(expert=2), world)
    module = Scaled()
    experts.split_experts(module, grid)
    tokens = (torch.ones(3, 2) * (1 + world.rank)).requires_grad_()
    weights = torch.full((3, 2), 0.5, requires_grad=True)
    chosen = torch.tensor([[0, 1]]).expand(3, 2)
    out = module(tokens, chosen, weights)
    out.sum().backward()
    assert tokens.grad is not None and module.factors.grad is not None
    return out.detach(), tokens.grad, module.factors.grad.full_tensor()


def train_two(world: World) -> list[object]:
    """Return what the cases give, and what they give with a fault: the gradients of the experts
    added up though the tokens had already come together."""
    found = [train_each(world, TWO), nobody_comes(world)]
    splits._axes_of = lambda how: ("data", "expert")
    return [*found, train_each(world, TWO)]


@pytest.fixture(scope="module")
def by_two() -> list[list[list[Outcome]]]:
    return in_processes(train_two, 2)


def test_two_processes_are_as_one(by_two: list[list[list[Outcome]]]) -> None:
    assert_each_same([each[0] for each in by_two], TWO)


def test_experts_that_nobody_chose_keep_no_one_waiting(by_two: list[list[object]]) -> None:
    for rank, (_, (out, to_tokens, to_factors), _) in enumerate(by_two):
        assert_close(out, torch.full((3, 2), 1.5 * (1 + rank)))
        assert_close(to_tokens, torch.full((3, 2), 1.5))
        # two processes, three tokens, two channels, half the weight
        assert_close(to_factors[:, 0], torch.tensor([9.0, 9.0, 0.0, 0.0]))


def test_a_sum_too_many_shows(by_two: list[list[list[Outcome]]]) -> None:
    assert_each_differs([each[2] for each in by_two], TWO)


def test_four_processes_are_as_one() -> None:
    assert_each_same(in_processes(train_each, 4, FOUR), FOUR)
