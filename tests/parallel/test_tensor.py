"""Heads, channels and vocabulary divided: losses, gradients and weights are those of one
process."""

from __future__ import annotations

import pytest

from deepseek.models import divided
from deepseek.parallel import Mesh, Rule, World
from tests.parallel.divided import (
    FAMILIES,
    Outcome,
    assert_each_differs,
    assert_each_same,
    train_each,
)
from tests.parallel.worlds import in_processes

pytestmark = pytest.mark.dist

TWO = [(family, Mesh(tensor=2)) for family in FAMILIES]
FOUR = [
    ("llama-tied", Mesh(data=2, tensor=2)),
    ("llama-biased", Mesh(tensor=2, pipeline=2)),
    ("deepseek-v3", Mesh(tensor=4)),
]
FAULTS = {"heads": "qwen3", "forked": "deepseek-v3", "behind a fork": "deepseek-v3"}
"""Rules that say where a gradient is added up, and a family that has each."""


def train_with_a_fault(world: World, how: str) -> list[Outcome]:
    """Train with a table in which the modules of one rule are computed whole, or as columns."""
    right = divided.decoder_splits
    wrong = "column" if how == "behind a fork" else "whole"
    divided.decoder_splits = lambda config: tuple(
        Rule(rule.pattern, wrong) if rule.how == how else rule for rule in right(config)
    )
    found = train_each(world, [(FAULTS[how], Mesh(tensor=2))])
    divided.decoder_splits = right
    return found


def train_two(world: World) -> list[list[Outcome]]:
    """Return what the cases give, then what each fault gives."""
    return [train_each(world, TWO), *(train_with_a_fault(world, how) for how in FAULTS)]


@pytest.fixture(scope="module")
def by_two() -> list[list[list[Outcome]]]:
    return in_processes(train_two, 2)


def test_two_processes_are_as_one(by_two: list[list[list[Outcome]]]) -> None:
    assert_each_same([each[0] for each in by_two], TWO)


def test_four_processes_are_as_one() -> None:
    assert_each_same(in_processes(train_each, 4, FOUR), FOUR)


@pytest.mark.parametrize("how", FAULTS)
def test_a_sum_that_is_left_out_shows(by_two: list[list[list[Outcome]]], how: str) -> None:
    place = 1 + list(FAULTS).index(how)
    assert_each_differs([each[place] for each in by_two], [(FAULTS[how], Mesh(tensor=2))])
