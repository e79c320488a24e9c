"""Layers that are done, on the disk: a stopped run goes on behind them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.compress.quantize.targets import Model
from deepseek.compress.stage import Stage
from deepseek.ops.quantized import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class LayerState:
    """What became of a layer."""

    parameters: dict[str, Tensor]
    """Of the whole layer, by the model's names; folds change others than those on a grid."""
    weights: dict[str, QuantizedWeight]

    def put_into(self, model: Model) -> dict[str, QuantizedWeight]:
        """Write the parameters into a model; return the weights on their grids."""
        for name, values in self.parameters.items():
            model.get_parameter(name).data.copy_(values)
        return self.weights


class KeptLayers:
    """The layers of one stage's run in its folder; what another one left there is not read."""

    def __init__(self, folder: Path, stage: Stage, seed: int) -> None:
        """Name the run by its settings.

        Args:
            folder: is made when the first layer is written.
            stage: whose settings must be the same.
            seed: likewise.
        """
        self.folder = folder
        settings = json.dumps([stage.to_dict(), seed], sort_keys=True)
        self.settings = hashlib.sha256(settings.encode()).hexdigest()

    def _path(self, place: int) -> Path:
        return self.folder / f"layer-{place}.pt"

    def read(self, place: int) -> LayerState | None:
        """Return a layer that this run wrote, or None; a file that is cut off counts as none."""
        try:
            held: dict[str, Any] = torch.load(self._path(place), weights_only=True)
            if held["settings"] != self.settings:
                return None
            weights = {name: QuantizedWeight(*values) for name, values in held["weights"].items()}
            return LayerState(held["parameters"], weights)
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError):
            return None

    def write(
        self, place: int, prefix: str, model: Model, weights: dict[str, QuantizedWeight]
    ) -> None:
        """Keep a layer: its parameters, those that are on a grid as codes alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {
            "settings": self.settings,
            "parameters": {
                name: parameter.detach()
                for name, parameter in model.named_parameters()
                if name.startswith(f"{prefix}.") and name not in weights
            },
            "weights": {
                name: (each.bits, each.codes, each.scale, each.zero, each.is_rotated)
                for name, each in weights.items()
            },
        }
        path = self._path(place)
        draft = path.with_suffix(".draft")
        torch.save(held, draft)
        draft.replace(path)
