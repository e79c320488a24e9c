"""Heads, channels and vocabulary divided: losses, gradients and weights are those of one
process."""

from __future__ import annotations

import pytest

from deepseek.models import divided
from deepseek.optim import Muon
from deepseek.parallel import Mesh, Rule, World
from tests.parallel.divided import (
    FAMILIES,
    OPTIMIZER,
    Outcome,
    assert_each_differs,
    assert_each_same,
    made,
    train_each,
    trained_divided,
    trained_whole,
)
from tests.parallel.worlds import in_processes

pytestmark = pytest.mark.dist

TWO = [(family, Mesh(tensor=2)) for family in FAMILIES]
MUON = Muon(rate=1e-2, adamw=OPTIMIZER)
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
    """Return what the cases give, then what each fault gives, and last what Muon gives."""
    found = [train_each(world, TWO), *(train_with_a_fault(world, how) for how in FAULTS)]
    return [*found, [trained_divided(world, FAMILIES["qwen3"], Mesh(tensor=2), MUON)]]


@pytest.fixture(scope="module")
def by_two() -> list[list[list[Outcome]]]:
    return in_processes(train_two, 2)


def test_two_processes_are_as_one(by_two: list[list[list[Outcome]]]) -> None:
    assert_each_same([each[0] for each in by_two], TWO)


def test_muon_orthogonalizes_the_whole_matrix(by_two: list[list[list[Outcome]]]) -> None:
    """It computes in bfloat16, where a last bit of float32 may become one of that; halves that are
    orthogonalized by themselves are a third of the way apart or more."""
    expected = trained_whole(FAMILIES["qwen3"], MUON)
    start = dict(made(FAMILIES["qwen3"]).named_parameters())
    found = by_two[0][-1][0].weights
    for name, value in start.items():
        moved = (expected.weights[name] - value).norm()
        assert (found[name] - expected.weights[name]).norm() < 0.1 * moved, name


def test_four_processes_are_as_one() -> None:
    assert_each_same(in_processes(train_each, 4, FOUR), FOUR)


@pytest.mark.parametrize("how", FAULTS)
def test_a_sum_that_is_left_out_shows(by_two: list[list[list[Outcome]]], how: str) -> None:
    place = 1 + list(FAULTS).index(how)
    assert_each_differs([each[place] for each in by_two], [(FAULTS[how], Mesh(tensor=2))])
