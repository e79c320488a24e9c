"""Training on a grid: gradients as in the source, stored numbers that are those trained with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from deepseek import hub
from deepseek.compress import Work
from deepseek.compress.distil import Imitation
from deepseek.compress.qat import (
    Grid,
    QuantizeAware,
    fake_quantize,
    fitted,
    quantize_aware,
    quantize_on,
)
from deepseek.compress.qat.grid import read_grids, write_grids
from deepseek.compress.qat.stage import first_grids
from deepseek.compress.quantize import Quantize
from deepseek.errors import ConfigError, FormatError
from deepseek.ops.quantized import QuantizedWeight, short_scale
from deepseek.optim import AdamW
from deepseek.train import Source
from tests.compress.learners import Killed, decoder, encoder, kill_after, work_of, write_sums
from tests.grids import rounded
from tests.tolerances import assert_close


def lsq(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The source's equations, with the rounding taken out of the gradient."""
    last = (1 << bits) - 1
    group = weight.shape[1] // scale.shape[1]
    factor = 1 / math.sqrt(group * (last // 2))
    scale = scale * factor + (scale - scale * factor).detach()
    steps, offset = scale.repeat_interleave(group, 1), zero.repeat_interleave(group, 1).float()
    places = torch.minimum(torch.maximum(weight / steps, -offset), last - offset)
    return (places + (places.round() - places).detach()) * steps


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [4, 12])
def test_gradients_are_those_of_the_source(bits: int, group: int) -> None:
    weight = torch.randn(5, 12)
    groups = 12 // group
    scale = short_scale(torch.rand(5, groups) * (0.3 if bits == 4 else 0.02) + 1e-3)
    zero = torch.randint(0, 1 << bits, (5, groups), dtype=torch.uint8)
    direction = torch.randn(5, 12)
    results = []
    for function in (fake_quantize, lsq):
        inputs = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(*inputs, zero, bits)
        results.append([out, *torch.autograd.grad((out * direction).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)
    outside = results[0][1] == 0
    assert outside.any() and not outside.all()


@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.sampled_from([1, 2, 8]))
def test_stored_numbers_are_those_of_the_pass(seed: int, bits: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 16, generator=generator)
    scale = torch.rand(3, groups, generator=generator) * 0.2 - 0.02
    zero = torch.randint(0, 1 << bits, (3, groups), dtype=torch.uint8, generator=generator)
    stored = quantize_on(weight, scale, zero, bits)
    assert torch.equal(stored.values(), fake_quantize(weight, scale, zero, bits))
    assert torch.equal(stored.scale.half().float(), stored.scale)
    again = quantize_on(stored.values(), stored.scale, zero, bits)
    assert torch.equal(again.codes, stored.codes) and torch.equal(again.scale, stored.scale)


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_fitted_grid_is_no_worse_than_the_whole_range(
    bits: Literal[4, 8], is_symmetric: bool
) -> None:
    weight = torch.randn(6, 64)
    weight[0], weight[1, :32] = 0.0, weight[1, :32].abs() + 1
    found = fitted(weight, Grid(bits=bits, group=32, is_symmetric=is_symmetric))
    assert found.bits == bits and found.group == 32
    assert found.is_symmetric or not is_symmetric
    last = (1 << bits) - 1
    span = weight.unflatten(-1, (-1, 32))
    low, high = span.amin(-1).clamp(max=0), span.amax(-1).clamp(min=0)
    scale = span.abs().amax(-1) / (last // 2) if is_symmetric else (high - low) / last
    middle = torch.full_like(scale, last // 2 + 1)
    zero = middle if is_symmetric else (-low / scale.clamp(min=1e-9)).round()
    plain = quantize_on(weight, scale, zero.to(torch.uint8), bits)

    def errors(each: QuantizedWeight) -> Tensor:
        return (each.values() - weight).square().unflatten(-1, (-1, 32)).sum(-1)

    # scales are short, which costs a little where 256 codes leave nothing to gain
    assert bool((errors(found) <= 1.05 * errors(plain) + 1e-9).all())
    if bits == 4:
        assert float(errors(found).sum()) < float(errors(plain).sum())
    assert torch.equal(found.values()[0], torch.zeros(64))


def settings(text: Path, **changes: object) -> QuantizeAware:
    values: dict[str, object] = {
        "data": (Source(path=str(text)),),
        "steps": 40,
        "length": 24,
        "batch": 8,
        "precision": "float32",
        "optimizer": AdamW(rate=2e-3, weight_decay=0.0),
        "checkpoint_every": 100,
        "grid": Grid(bits=4, group=16),
    }
    return QuantizeAware(**{**values, **changes})  # type: ignore[arg-type]


def assert_on_grid(work: Work) -> None:
    for name, weight in work.quantized.items():
        assert torch.equal(work.model.get_parameter(name), weight.values()), name


@pytest.mark.parametrize("scales", ["learned", "fixed"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_learns_on_its_grid(scales: str, tied: bool, tmp_path: Path) -> None:
    text = write_sums(tmp_path / "sums.txt")
    teacher = decoder(1, tie_embeddings=tied)
    work = work_of(decoder(1, tie_embeddings=tied), teacher, tmp_path)
    start = first_grids(work.model, settings(text))
    found = {each.name: each.value for each in quantize_aware(settings(text, scales=scales), work)}
    assert found["training_loss"] < 0.7 * found["first_training_loss"]
    assert 0.01 < found["moved_codes"] < 1
    assert_on_grid(work)
    matrices = [name for name, value in work.model.named_parameters() if value.ndim == 2]
    assert sorted(work.quantized) == sorted(matrices)
    embedding = work.quantized["model.embed_tokens.weight"]
    assert (embedding.bits, embedding.group, embedding.is_symmetric) == (8, 32, True)
    assert work.quantized["model.layers.0.mlp.up_proj.weight"].group == 16
    for name, weight in work.quantized.items():
        assert torch.equal(weight.zero, start[name].zero)
        assert torch.equal(weight.scale, start[name].scale) == (scales == "fixed")
    kept = hub.load(work.folder / "stages" / "qat").state_dict()
    assert set(kept) == set(teacher.state_dict())
    assert all(torch.equal(value, kept[name]) for name, value in work.model.state_dict().items())


def test_a_grid_of_a_stage_before_stays(tmp_path: Path) -> None:
    text = write_sums(tmp_path / "sums.txt")
    teacher = decoder(1)
    work = work_of(decoder(1), teacher, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    grid = fitted(work.model.get_parameter(name).detach(), Grid(group=8))
    work.set_quantized({name: dataclasses.replace(grid, input_scale=0.25)})
    zero = work.quantized[name].zero.clone()
    codes = work.quantized[name].codes.clone()
    quantize_aware(settings(text, steps=3), work)
    assert list(work.quantized) == [name]
    assert work.quantized[name].input_scale == 0.25
    assert work.quantized[name].group == 8 and torch.equal(work.quantized[name].zero, zero)
    assert not torch.equal(work.quantized[name].codes, codes)
    assert_on_grid(work)


def test_a_killed_stage_ends_the_same(tmp_path: Path) -> None:
    text = write_sums(tmp_path / "sums.txt")
    stage = settings(text, steps=7, checkpoint_every=2)
    whole = work_of(decoder(1), decoder(1), tmp_path, "whole")
    quantize_aware(stage, whole)
    for steps in (3, 4):
        killed = work_of(decoder(1), decoder(1), tmp_path, "killed")
        with pytest.raises(Killed):
            quantize_aware(stage, kill_after(killed, steps))
    for _ in range(2):
        last = work_of(decoder(1), decoder(1), tmp_path, "killed")
        quantize_aware(stage, last)
        for name, weight in whole.quantized.items():
            assert torch.equal(weight.codes, last.quantized[name].codes)
            assert torch.equal(weight.scale, last.quantized[name].scale)
        ours, theirs = whole.model.state_dict(), last.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_an_encoder_learns_on_its_grid(tmp_path: Path) -> None:
    text = write_sums(tmp_path / "sums.txt")
    work = work_of(encoder(1), encoder(1), tmp_path)
    stage = settings(text, imitation=Imitation(relations=0.5), embedding=None)
    found = {each.name: each.value for each in quantize_aware(stage, work)}
    assert found["training_loss"] < found["first_training_loss"]
    assert "embeddings.word_embeddings.weight" not in work.quantized
    assert "encoder.layer.0.attention.self.query.weight" in work.quantized
    assert_on_grid(work)


def test_grids_are_written_and_read(tmp_path: Path) -> None:
    weights = {
        "a.weight": fitted(torch.randn(3, 8), Grid(bits=4, group=4)),
        "b.weight": fitted(torch.randn(2, 6), Grid(bits=8, group=None)),
    }
    path = tmp_path / "folder" / "grids.safetensors"
    write_grids(path, weights)
    found = read_grids(path)
    assert list(found) == ["a.weight", "b.weight"]
    for name, weight in weights.items():
        assert found[name].bits == weight.bits
        assert torch.equal(found[name].values(), weight.values())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FormatError, match="grids"):
        read_grids(path)
    with pytest.raises(FormatError, match="grids"):
        read_grids(tmp_path / "none")


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="group"):
        first_grids(decoder(1), settings(Path("x"), grid=Grid(group=7)))
    with pytest.raises(ConfigError, match="group"):
        Grid(group=0)
    stage = QuantizeAware()
    assert QuantizeAware.from_dict(stage.to_dict()) == stage
    assert stage.puts_on_grid and stage.why_not_after([stage]) is None
    rotated = Quantize.usual(8)
    assert "rotated" in str(stage.why_not_after([rotated]))
    assert stage.why_not_after([rotated.replace(rotate=False)]) is None


def test_a_rotated_grid_is_refused(tmp_path: Path) -> None:
    work = work_of(decoder(1, hidden_size=64), decoder(1, hidden_size=64), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = work.model.get_parameter(name).detach()
    work.set_quantized({name: rounded(weight, 8, 64, symmetric=True, rotated=True)})
    with pytest.raises(ConfigError, match="grid of qat must be not rotated"):
        quantize_aware(settings(write_sums(tmp_path / "sums.txt"), steps=3), work)
