"""The demo's gates hold on a sound model, and go red where ours is wrong in one weight or NaN, and
where what is shipped is not what was made."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from deepseek.cli.demo.shipping import ship
from deepseek.cli.demo.state import Demo
from deepseek.cli.demo.steps import equality
from deepseek.cli.output import Output
from deepseek.compress import Pipeline, Quantize, compress


@pytest.mark.parametrize("damage", [None, 0.01, math.nan])
def test_the_equality_gate(damage: float | None, tiny_folder: str, tmp_path: Path) -> None:
    demo = Demo(tiny_folder, tmp_path, Output(as_json=True))
    weight = demo.model("float32").model.layers[1].mlp.down_proj.weight
    if damage is not None:
        with torch.no_grad():
            weight[0, 0] += damage
    section = equality(demo)
    assert (section.failure is None) == (damage is None), section.failure
    assert len(section.charts[0].values) == 8


@pytest.mark.slow
@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_shipping_gates(is_damaged: bool, tiny_folder: str, tmp_path: Path) -> None:
    demo = Demo(tiny_folder, tmp_path, Output(as_json=True))
    stage = Quantize(bits=8, group=None, method="round")
    pipeline = Pipeline(model=tiny_folder, stages=(stage,), gates=())
    demo.small["int8"] = compress(pipeline, demo.scratch / "int8").bundle
    if is_damaged:  # what is proven against is not what is exported
        weight = demo.model("float32").model.layers[1].mlp.down_proj.weight
        with torch.no_grad():
            weight[0, 0] += 0.5
    section = ship(demo)
    assert ("depart from the ONNX export" in (section.failure or "")) == is_damaged
    assert "signed; applied, file for file" in section.words
