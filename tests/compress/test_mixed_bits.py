"""Bits of each unit: the best choice within a budget, by losses that are measured."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deepseek.compress.quantize.grid import Grid, round_weight
from deepseek.compress.quantize.mixed import Choice, MixedBits, choose, sensitivities
from deepseek.compress.quantize.targets import units
from deepseek.errors import CapacityError, ConfigError
from tests.compress.small import samples, small_decoder, small_encoder

CHOICE = st.builds(Choice, num_bytes=st.integers(0, 30), loss=st.floats(-1, 10, allow_nan=False))


@settings(max_examples=150, deadline=None)
@given(
    options=st.lists(st.lists(CHOICE, min_size=1, max_size=3), min_size=1, max_size=6),
    budget=st.integers(0, 150),
)
def test_the_choice_is_the_best_of_all(options: list[list[Choice]], budget: int) -> None:
    fitting = [
        sum(each.loss for each in picked)
        for picked in itertools.product(*options)
        if sum(each.num_bytes for each in picked) <= budget
    ]
    if not fitting:
        with pytest.raises(CapacityError, match="budget"):
            choose(options, budget)
        return
    picked = [unit[place] for unit, place in zip(options, choose(options, budget), strict=True)]
    assert sum(each.num_bytes for each in picked) <= budget
    assert sum(each.loss for each in picked) == pytest.approx(min(fitting), abs=1e-9)


def test_many_units_are_chosen_in_time() -> None:
    torch.manual_seed(0)
    options = [
        [Choice(size, float(torch.rand(())) + 1), Choice(2 * size, float(torch.rand(())))]
        for size in (995_328, 331_776, 1_769_472, 884_736)
        for _ in range(30)
    ]
    least = sum(unit[0].num_bytes for unit in options)
    picked = choose(options, int(1.3 * least))
    assert 0 < sum(picked) < len(picked)


@pytest.mark.parametrize("is_encoder", [False, True])
def test_losses_are_those_of_one_unit_rounded_alone(is_encoder: bool) -> None:
    model = small_encoder() if is_encoder else small_decoder()
    batches = samples(2, padded=is_encoder)
    inner = [unit for unit in units(model) if unit.layer is not None]
    grids = {4: Grid(4, 32, False), 8: Grid(8, None, True)}
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = sensitivities(model, inner, grids, batches, "float32")
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert sum(by_bits[4] for by_bits in found) > 20 * sum(by_bits[8] for by_bits in found)
    if is_encoder:
        return
    place = 5
    with torch.no_grad():
        wanted = [model(*batch).logits.log_softmax(-1) for batch in batches]
        for name in inner[place].weights:
            parameter = model.get_parameter(name)
            parameter.copy_(round_weight(parameter, grids[4]).values())
        ours = [model(*batch).logits.log_softmax(-1) for batch in batches]
    losses = [
        float((theirs.exp() * (theirs - each)).sum(-1).mean())
        for theirs, each in zip(wanted, ours, strict=True)
    ]
    assert found[place][4] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget_bytes"):
        MixedBits(budget_bytes=0)
