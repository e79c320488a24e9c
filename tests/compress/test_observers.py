"""Ranges of numbers that are seen in parts."""

from __future__ import annotations

import pytest
import torch

from deepseek.compress.quantize.observers import Magnitudes


def seen(values: torch.Tensor, parts: int = 7) -> Magnitudes:
    found = Magnitudes()
    for part in values.chunk(parts):
        found.see(part)
    return found


def outlying(size: float) -> torch.Tensor:
    torch.manual_seed(0)
    values = torch.randn(20000) * size
    values[11111] = 40 * values.std()
    return values


@pytest.mark.parametrize("size", [0.01, 1.0, 10.0])
def test_the_largest_and_the_percentile_are_those_of_all_numbers(size: float) -> None:
    values = outlying(size)
    found = seen(values)
    assert found.limit("minmax") == float(values.abs().max())
    assert int(found.counts.sum()) == len(values)
    expected = float(values.abs().quantile(0.999, interpolation="higher"))
    limit = found.limit("percentile", percentile=99.9)
    assert abs(limit - expected) <= 1.01 * found.reach / 2048


def squared_error(values: torch.Tensor, limit: float, levels: int) -> float:
    scale = limit / levels
    rounded = (values / scale).round().clamp(-levels, levels) * scale
    return float((rounded - values).square().sum())


@pytest.mark.parametrize("size", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_squared_error_is_least_among_the_shares(bits: int, size: float) -> None:
    values, levels = outlying(size), (1 << (bits - 1)) - 1
    found = seen(values)
    limit, largest = found.limit("mse", bits=bits), float(values.abs().max())
    error = squared_error(values, limit, levels)
    tried = [squared_error(values, largest * (1 - step / 50), levels) for step in range(45)]
    assert error <= 1.05 * min(tried)
    assert error <= tried[0]
    counted = found.relative_error(limit, bits=bits)
    assert counted == pytest.approx(error / float(values.square().sum()), rel=0.05)


def test_the_divergence_cuts_an_outlier_and_not_a_flat_distribution() -> None:
    values = outlying(1.0)
    assert seen(values).limit("kl") < 0.6 * float(values.abs().max())
    assert seen(torch.rand(20000)).limit("kl") > 0.9


def test_nothing_and_zeros_have_a_limit() -> None:
    for found in (Magnitudes(), seen(torch.zeros(100))):
        for observer in ("minmax", "percentile", "mse", "kl"):
            assert found.limit(observer) == 0.0
        assert found.relative_error(0.0) == 0.0
