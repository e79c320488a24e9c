"""`model.quantize`: numbers, engine and file say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deepseek
from deepseek import hub
from deepseek.compress import Calibration
from deepseek.errors import ConfigError
from deepseek.generate.modules import engine_of
from deepseek.hub import Bundle
from deepseek.models import Decoder
from deepseek.ops.cpu import why_missing
from tests.compress.small import small_decoder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 8, "rotate": False},
        {"bits": 8, "method": "gptq"},
        {"bits": 4, "method": "round", "group": None},
    ],
)
def test_a_model_is_quantized_in_place_and_saved(
    start: Path, text: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    model = deepseek.load(start, dtype="float32")
    assert isinstance(model, Decoder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    few = Calibration(text=str(text), samples=4, length=32)
    grids = model.quantize(calibration=few, **settings)  # type: ignore[attr-defined]
    assert set(grids.weights) == {name for name, value in before.items() if value.ndim == 2}
    for name, weight in grids.weights.items():
        assert torch.equal(model.get_parameter(name), weight.values())
        assert not torch.equal(model.get_parameter(name), before[name])
    deepseek.save(model, tmp_path / "small", quantized=grids)
    stored = hub.quantized_weights(Bundle.open(tmp_path / "small"))
    assert all(torch.equal(stored[name].codes, each.codes) for name, each in grids.weights.items())
    if why_missing() is None:
        engine = engine_of(model)
        assert engine is not None and engine.scheme.as_stored


def test_rotated_weights_run_on_their_grid_to_the_bit(tmp_path: Path) -> None:
    model = small_decoder()
    grids = model.quantize(calibration=Calibration(samples=2, length=16))  # type: ignore[attr-defined]
    assert {weight.is_rotated for weight in grids.weights.values()} == {True, False}
    deepseek.save(model, tmp_path / "small", quantized=grids)
    loaded = deepseek.load(tmp_path / "small", dtype="float32")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    if why_missing() is None:
        for each in (model, loaded):
            engine = engine_of(each)
            assert engine is not None and engine.scheme.as_stored


def test_a_setting_that_is_none_is_told(start: Path) -> None:
    model = deepseek.load(start)
    with pytest.raises(ConfigError, match="Did you mean"):
        model.quantize(methods="gptq")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="bits"):
        model.quantize(bits=3)  # type: ignore[attr-defined]
