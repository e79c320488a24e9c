"""Layers divided: losses, gradients and weights are those of one process."""

from __future__ import annotations

import pytest

from deepseek.errors import ConfigError
from deepseek.models.divided import DividedDecoder
from deepseek.parallel import Grid, Mesh, World, gradients
from tests.parallel.divided import (
    FAMILIES,
    Outcome,
    assert_each_differs,
    assert_each_same,
    made,
    samples,
    train_each,
)
from tests.parallel.worlds import in_processes

pytestmark = pytest.mark.dist

TWO = [(family, Mesh(pipeline=2)) for family in ("llama-tied", "qwen3", "deepseek-v3")]
FOUR = [
    ("llama-tied", Mesh(pipeline=4)),
    ("llama-tied", Mesh(tensor=2, pipeline=2)),
    ("deepseek-v3", Mesh(expert=2, pipeline=2)),
]
TIED = TWO[:1]


def refusal(world: World) -> str:
    """Return what is said of fewer parts than stages."""
    divided = DividedDecoder(made(FAMILIES["qwen3"]), Grid(Mesh(pipeline=2), world))
    try:
        divided.backward(*samples(), 1, 1.0)
    except ConfigError as error:
        return str(error)
    return ""


def train_two(world: World) -> tuple[list[Outcome], str, list[Outcome]]:
    """Return what the cases give, a refusal, and what comes of a tied weight whose two gradients
    are not added up."""
    found = train_each(world, TWO), refusal(world)
    gradients.GradientSum._sum_over_stages = lambda *_: None
    return *found, train_each(world, TIED)


@pytest.fixture(scope="module")
def by_two() -> list[tuple[list[Outcome], str, list[Outcome]]]:
    return in_processes(train_two, 2)


def test_two_processes_are_as_one(by_two: list[tuple[list[Outcome], str, list[Outcome]]]) -> None:
    assert_each_same([each[0] for each in by_two], TWO)


def test_fewer_parts_than_stages_are_refused(by_two: list[tuple[object, str, object]]) -> None:
    for _, said, _ in by_two:
        assert "at least 2, one for each stage" in said


def test_a_tied_gradient_left_out_shows(
    by_two: list[tuple[list[Outcome], str, list[Outcome]]],
) -> None:
    assert_each_differs([each[2] for each in by_two], TIED)


def test_four_processes_are_as_one() -> None:
    assert_each_same(in_processes(train_each, 4, FOUR), FOUR)
