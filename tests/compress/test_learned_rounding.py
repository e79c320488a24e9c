"""Rounding and scales that are learned: their slopes, and that they get nearer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from deepseek.compress.quantize.end_to_end import EndToEnd, Scaled, learn_scales
from deepseek.compress.quantize.grid import Grid, fit, nearest
from deepseek.compress.quantize.learned import Learned, Rounding, learn_rounding
from deepseek.compress.quantize.targets import Model, layers_of, units
from deepseek.compress.quantize.walk import Precision, first_flows, relative_error, through
from deepseek.errors import ConfigError
from deepseek.models import Encoder
from deepseek.ops.quantized import QuantizedWeight
from tests.compress.small import samples, small_decoder, small_encoder

GRID = Grid(4, 32, False)


class Nearest(torch.autograd.Function):
    """Rounding whose slope is 1."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: object, *slopes: Tensor) -> Tensor:
        return slopes[0]


@pytest.mark.parametrize("grid", [GRID, Grid(4, 16, True), Grid(8, None, True)])
def test_a_step_goes_against_the_slope_of_the_straight_through_estimator(grid: Grid) -> None:
    torch.manual_seed(3)
    weight, slope = torch.randn(6, 64), torch.randn(6, 64)
    scales = fit(weight, grid)
    rounding = Rounding(weight, grid, scales)
    rounding.offset.copy_(torch.rand_like(rounding.offset) * 0.8 - 0.4)
    offset = rounding.offset.clone().requires_grad_()
    ratio = torch.ones_like(scales.scale, requires_grad=True)
    scale, zero = (scales.scale * ratio)[..., None], scales.zero[..., None]
    blocks = weight.unflatten(-1, (scales.scale.shape[1], -1))
    codes = (Nearest.apply(blocks / scale + offset) + zero).clamp(grid.bottom, grid.top)
    values = ((codes - zero) * scale).flatten(-2)
    assert torch.equal(rounding.values(torch.float32).detach(), values.detach())
    values.backward(slope)
    rounding.step(slope, 0.01, 0.002)
    assert offset.grad is not None and ratio.grad is not None
    moved = rounding.offset - offset.detach()
    torch.testing.assert_close(moved, -0.01 * offset.grad.sign(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rounding.ratio, 1 - 0.002 * ratio.grad.sign())


def test_offsets_stay_within_half_a_step_and_values_are_what_is_stored() -> None:
    weight = torch.randn(4, 32)
    rounding = Rounding(weight, GRID, fit(weight, GRID))
    for _ in range(80):
        rounding.values(torch.float32)
        rounding.step(torch.ones(4, 32), 0.02, 0.01)
    assert float(rounding.offset.abs().max()) <= 0.5
    assert float(rounding.ratio.min()) >= 0.5
    assert torch.equal(rounding.values(torch.float32).detach(), rounding.weight().values())


def rounded(model: Model) -> dict[str, QuantizedWeight]:
    names = [name for unit in units(model) if unit.layer is not None for name in unit.weights]
    weights = {name: model.get_parameter(name).data for name in names}
    return {name: nearest(each, GRID, fit(each, GRID)) for name, each in weights.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_encoder", [False, True])
def test_a_layer_gets_nearer_to_what_it_gave(precision: Precision, is_encoder: bool) -> None:
    model = small_encoder() if is_encoder else small_decoder()
    prefix, layers = layers_of(model)
    flows = first_flows(model, samples(padded=is_encoder))
    expected = through(layers[0], flows, "float32")
    names = [name for name in rounded(model) if name.startswith(f"{prefix}.0.")]
    start = {}
    for name in names:
        weight = model.get_parameter(name).data
        start[name.removeprefix(f"{prefix}.0.")] = Rounding(weight, GRID, fit(weight, GRID))

    def error(weights: dict[str, QuantizedWeight]) -> float:
        tried = copy.deepcopy(layers[0])
        for name, each in weights.items():
            tried.get_parameter(name).data.copy_(each.values())
        return relative_error(expected, through(tried, flows, "float32"))

    before = error({name: each.weight() for name, each in start.items()})
    targets = [flow.states for flow in expected]
    settings = Learned(steps=60, rate=0.02, scale_rate=0.002)
    learned = learn_rounding(layers[0], start, flows, targets, settings, precision, seed=0)
    assert error(learned) < 0.7 * before
    assert all(parameter.grad is None for parameter in layers[0].parameters())


def test_scales_have_the_slope_of_their_product() -> None:
    levels = torch.randint(-8, 8, (3, 2, 8), dtype=torch.int8)
    scale, slope = torch.rand(3, 2, requires_grad=True), torch.randn(3, 16)
    plain = scale.detach().clone().requires_grad_()
    expected = (levels.float() * plain[..., None]).flatten(-2)
    found = Scaled.apply(scale, levels, torch.float32)
    assert torch.equal(found, expected)
    expected.backward(slope)
    found.backward(slope)
    assert scale.grad is not None and plain.grad is not None
    torch.testing.assert_close(scale.grad, plain.grad)


@pytest.mark.parametrize("is_encoder", [False, True])
def test_a_model_gets_nearer_to_its_teacher_by_scales_alone(is_encoder: bool) -> None:
    model = small_encoder() if is_encoder else small_decoder()
    teacher, batches = copy.deepcopy(model), samples(padded=is_encoder)
    weights = rounded(model)

    def loss(made: dict[str, QuantizedWeight]) -> float:
        for name, each in made.items():
            model.get_parameter(name).data.copy_(each.values())
        with torch.no_grad():
            return sum(distance(model, teacher, batch) for batch in batches)

    before = loss(weights)
    settings = EndToEnd(steps=40, rate=5e-3)
    learned = learn_scales(model, teacher, weights, batches, settings, "float32", seed=0)
    assert all(torch.equal(learned[name].codes, weights[name].codes) for name in weights)
    assert loss(learned) < 0.95 * before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_teaches_nothing() -> None:
    model, batches = small_encoder(), samples(padded=True)
    teacher, weights = copy.deepcopy(model), rounded(model)
    others = [each._replace(input_ids=each.input_ids * each.attention_mask) for each in batches]
    assert not torch.equal(others[0].input_ids, batches[0].input_ids)
    settings = EndToEnd(steps=5, rate=5e-3)
    found = [
        learn_scales(model, teacher, weights, each, settings, "float32", seed=0)
        for each in (batches, others)
    ]
    assert all(torch.equal(found[0][name].scale, found[1][name].scale) for name in weights)


def distance(model: Model, teacher: Model, batch: object) -> float:
    assert isinstance(batch, tuple)
    if isinstance(model, Encoder):
        mask = batch[1].bool()
        ours, theirs = (each(*batch).last_hidden_state[mask] for each in (model, teacher))
        return float((ours - theirs).square().mean())
    ours, theirs = (each(*batch).logits.log_softmax(-1) for each in (model, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_settings_that_cannot_be_are_refused() -> None:
    for settings in ({"steps": 0}, {"batch": 0}, {"rate": 0.6}, {"scale_rate": -1.0}):
        with pytest.raises(ConfigError, match="Learned"):
            Learned(**settings)
    for settings in ({"steps": 0}, {"rate": 0.0}, {"batch": 0}):
        with pytest.raises(ConfigError, match="EndToEnd"):
            EndToEnd(**settings)
