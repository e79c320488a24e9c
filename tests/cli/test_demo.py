"""The demo's gate holds on equal models, and goes red when ours is wrong in one weight or NaN."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from deepseek.cli.demo.state import Demo
from deepseek.cli.demo.steps import equality
from deepseek.cli.output import Output


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
