"""The stage that fixes the scales of inputs: what it finds, and that the engine computes by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.compress import Calibration, Pipeline, Quantize, StaticInputs, Work, compress
from deepseek.compress.quantize.stage import quantize
from deepseek.compress.quantize.static_inputs import apply, input_ranges
from deepseek.errors import ConfigError
from deepseek.hub import Bundle
from deepseek.ops.quantized import rotate
from tests.compress.small import WIDE, samples, small_decoder, small_encoder

EIGHT = Quantize.usual(8, precision="float32", head_group=32, rotate=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} says {number * 7}.\n" for number in range(300)))
    return path


def quantized(folder: Path, stage: Quantize = EIGHT, *, tied: bool = False) -> Work:
    model = small_decoder(WIDE.replace(tie_embeddings=tied, intermediate_size=128))
    work = Work(model=model, start=folder, folder=folder)
    quantize(stage, work, samples())
    return work


def stage_of(text: Path, **changes: object) -> StaticInputs:
    return StaticInputs(calibration=Calibration(text=str(text), samples=8, length=32), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_every_product_on_a_grid_gets_a_scale(tmp_path: Path, text: Path, tied: bool) -> None:
    work = quantized(tmp_path, tied=tied)
    before = dict(work.quantized)
    apply(stage_of(text), work)
    assert set(work.quantized) == set(before)
    for name, weight in work.quantized.items():
        has_scale = "embed" not in name
        assert (weight.input_scale is not None) == has_scale, name
        assert torch.equal(weight.codes, before[name].codes)
    of = {name: work.quantized[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"}
    assert len({each.input_scale for each in of.values()}) == 1


def test_ranges_are_of_what_was_seen_behind_the_rotation(tmp_path: Path) -> None:
    rotated = Quantize.usual(8, precision="float32", head_group=64)
    work = quantized(tmp_path, rotated)
    name = "model.layers.1.mlp.down_proj"
    weight = work.quantized[f"{name}.weight"]
    assert weight.is_rotated
    caught: list[torch.Tensor] = []
    module = work.model.get_submodule(name)
    module.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    found = input_ranges(work.model, {name: weight}, samples(), "minmax")[name]
    largest = max(float(rotate(each).abs().max()) for each in caught)
    assert found.scale == pytest.approx(largest / 127)
    assert 0 < found.error < 1e-3


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "kl"])
def test_every_observer_holds_a_model(tmp_path: Path, text: Path, observer: str) -> None:
    work = quantized(tmp_path)
    outcome = apply(stage_of(text, observer=observer), work)
    figures = {each.name: each.value for each in outcome}
    assert figures["dynamic_inputs"] == 0
    assert 0 < figures["input_error_largest"] < 0.02


def test_products_whose_inputs_lose_too_much_stay_dynamic(tmp_path: Path, text: Path) -> None:
    work = quantized(tmp_path)
    every = apply(stage_of(text), work)
    most = {each.name: each.value for each in every}["input_error_largest"]
    few = apply(stage_of(text, most_error=most * 0.9), work)
    figures = {each.name: each.value for each in few}
    assert figures["dynamic_inputs"] >= 1
    assert figures["input_error_largest"] <= most * 0.9
    dynamic = [name for name, each in work.quantized.items() if each.input_scale is None]
    assert len(dynamic) == figures["dynamic_inputs"] + 1  # the embedding


def test_an_encoder_too(tmp_path: Path, text: Path) -> None:
    model = small_encoder()
    work = Work(model=model, start=tmp_path, folder=tmp_path)
    quantize(EIGHT, work, samples(padded=True))
    apply(stage_of(text), work)
    scales = {name: each.input_scale for name, each in work.quantized.items()}
    assert all((scale is None) == ("embeddings" in name) for name, scale in scales.items())


def test_without_a_grid_it_is_one_line(tmp_path: Path, text: Path) -> None:
    work = Work(model=small_decoder(), start=tmp_path, folder=tmp_path)
    with pytest.raises(ConfigError, match="quantizes"):
        apply(stage_of(text), work)
    with pytest.raises(ConfigError, match="most_error"):
        StaticInputs(most_error=0.0)


def test_a_pipeline_keeps_them(tmp_path: Path, text: Path) -> None:
    hub.save(small_decoder(), tmp_path / "start")
    pipeline = Pipeline(
        model=str(tmp_path / "start"), stages=(EIGHT, stage_of(text)), floor_text=str(text)
    )
    made = compress(pipeline, tmp_path / "run").bundle
    found = hub.quantized_weights(Bundle.open(made.path))
    assert sum(each.input_scale is not None for each in found.values()) == len(found) - 1
