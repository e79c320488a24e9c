"""Adapters of the tiny engine as files, random and far from doing nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from deepseek.hub.adapter import CONFIG, WEIGHTS
from tests.generate.conftest import TINY

RANK = 4


def write_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter beside two matrices of every layer and return its folder."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in range(TINY.num_layers):
        for name, n, k in (("self_attn.q_proj", 32, 32), ("mlp.down_proj", 32, 48)):
            module = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (RANK, k)), ("B", (n, RANK))):
                values = draw.normal(0, 0.5, shape).astype(np.float32)
                tensors[f"{module}.lora_{part}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": None}
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    return folder
