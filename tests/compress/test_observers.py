"""Static ranges of inputs, and what rounding inputs by them costs."""

from __future__ import annotations

import pytest
import torch

from deepseek.compress.quantize.activations import input_scales, products, rounded_inputs
from deepseek.compress.quantize.observers import Magnitudes
from deepseek.models import Decoder
from tests.compress.small import samples, small_decoder


def seen(values: torch.Tensor, parts: int = 7) -> Magnitudes:
    found = Magnitudes(len(values))
    for part in values.chunk(parts, 1):
        found.see(part)
    return found


def outlying(rows: int = 3) -> torch.Tensor:
    torch.manual_seed(0)
    values = torch.randn(rows, 20000) * torch.tensor([[1.0], [10.0], [0.01]])[:rows]
    values[:, 11111] = 40 * values.std(1)
    return values


def test_the_largest_and_the_percentile_are_those_of_all_numbers() -> None:
    values = outlying()
    found = seen(values)
    assert torch.equal(found.limits("minmax"), values.abs().amax(1))
    expected = values.abs().quantile(0.999, dim=1, interpolation="higher")
    width = found.reach / 2048
    limits = found.limits("percentile", percentile=99.9)
    assert bool(((limits - expected).abs() <= 1.01 * width).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_squared_error_is_least_among_the_shares(bits: int) -> None:
    values, levels = outlying(), (1 << (bits - 1)) - 1
    limits = seen(values).limits("mse", bits=bits)

    def error(limit: torch.Tensor) -> torch.Tensor:
        scale = limit[:, None] / levels
        return (((values / scale).round().clamp(-levels, levels) * scale) - values).square().sum(1)

    largest = values.abs().amax(1)
    tried = torch.stack([error(largest * (1 - step / 50)) for step in range(45)])
    assert bool((error(limits) <= 1.05 * tried.amin(0)).all())
    assert bool((error(limits) <= error(largest)).all())


def test_the_divergence_cuts_an_outlier_and_not_a_flat_distribution() -> None:
    limits = seen(outlying()).limits("kl")
    assert bool((limits < 0.6 * outlying().abs().amax(1)).all())
    flat = torch.rand(2, 20000)
    assert bool((seen(flat).limits("kl") > 0.9).all())


def test_nothing_and_zeros_have_a_limit() -> None:
    zeros = seen(torch.zeros(2, 100))
    for observer in ("minmax", "percentile", "mse", "kl"):
        assert torch.equal(zeros.limits(observer), torch.zeros(2))


def divergence(model: Decoder, scales: dict[str, torch.Tensor] | None) -> float:
    ids = samples(1)[0].input_ids
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        with rounded_inputs(model, scales):
            found = model(ids).logits.log_softmax(-1)
        assert torch.equal(model(ids).logits.log_softmax(-1), expected)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_inputs_are_rounded_by_static_scales_and_by_each_tokens_own() -> None:
    model = small_decoder()
    losses = {}
    for granularity in ("tensor", "channel"):
        scales = input_scales(model, samples(), "minmax", granularity)
        assert set(scales) == set(products(model))
        assert all(
            len(scale) == (1 if granularity == "tensor" else products(model)[name].in_features)
            for name, scale in scales.items()
        )
        losses[granularity] = divergence(model, scales)
    losses["token"] = divergence(model, None)
    assert 0 < losses["channel"] < losses["tensor"]
    assert 0 < losses["token"] < losses["tensor"]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "kl"])
def test_every_observer_gives_scales_that_hold_a_model(observer: str) -> None:
    model = small_decoder()
    assert divergence(model, input_scales(model, samples(), observer)) < 0.2
