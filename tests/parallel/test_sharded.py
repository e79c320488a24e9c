"""Weights, gradients and moments divided: losses, gradients and weights are those of one
process."""

from __future__ import annotations

import pytest
from torch.distributed.fsdp import FSDPModule

from deepseek.models.divided import DividedDecoder
from deepseek.parallel import Grid, Mesh, World, local_of
from tests.parallel.divided import (
    FAMILIES,
    Outcome,
    assert_each_differs,
    assert_each_same,
    made,
    train_each,
)
from tests.parallel.worlds import in_processes

pytestmark = pytest.mark.dist

TWO = [(family, Mesh(shard=2)) for family in ("llama-tied", "qwen3-moe", "deepseek-v3")]
FOUR = [
    ("llama-biased", Mesh(shard=4)),
    ("llama-tied", Mesh(data=2, shard=2)),
    ("deepseek-v3", Mesh(shard=2, tensor=2)),
    ("qwen3-moe", Mesh(expert=2, shard=2)),
    ("llama-tied", Mesh(shard=2, pipeline=2)),
]


def num_held(world: World) -> tuple[int, int]:
    """Return the values that this process holds of a model, and those of the whole."""
    model = made(FAMILIES["llama-tied"])
    whole = sum(value.numel() for value in model.parameters())
    divided = DividedDecoder(model, Grid(Mesh(shard=2), world))
    return sum(local_of(value).numel() for _, value in divided.named_parameters()), whole


def train_two(world: World) -> tuple[list[Outcome], tuple[int, int], list[Outcome]]:
    """Return what the cases give, what is held, and what comes of gradients that are averaged."""
    found = train_each(world, TWO), num_held(world)
    FSDPModule.set_gradient_divide_factor = lambda *_: None
    return *found, train_each(world, TWO)


@pytest.fixture(scope="module")
def by_two() -> list[tuple[list[Outcome], tuple[int, int], list[Outcome]]]:
    return in_processes(train_two, 2)


def test_two_processes_are_as_one(
    by_two: list[tuple[list[Outcome], tuple[int, int], list[Outcome]]],
) -> None:
    assert_each_same([each[0] for each in by_two], TWO)


def test_each_holds_a_half(by_two: list[tuple[object, tuple[int, int], object]]) -> None:
    for _, (held, whole), _ in by_two:
        assert held == pytest.approx(whole / 2, rel=0.02)


def test_a_mean_in_place_of_a_sum_shows(
    by_two: list[tuple[list[Outcome], tuple[int, int], list[Outcome]]],
) -> None:
    assert_each_differs([each[2] for each in by_two], TWO)


def test_four_processes_are_as_one() -> None:
    assert_each_same(in_processes(train_each, 4, FOUR), FOUR)
