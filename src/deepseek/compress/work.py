"""The model between the stages of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from deepseek.models import Decoder, Encoder
from deepseek.models.single_weights import weight_of
from deepseek.ops.quantized import QuantizedWeight
from deepseek.ops.scheme import KVStorage
from deepseek.records import Measurement

Report = Callable[[str, float | None], None]
"""Told of long work: what, and the share that is done (None where it is not known)."""
Outcome = tuple[Measurement, ...]
"""What a stage measured of its own work: shares removed, errors, seconds."""


@dataclasses.dataclass
class Work:
    """What a stage takes and changes.

    A stage puts another model in the place of `model`, or changes it in place; what it puts into
    `quantized` it also writes into the model's parameters, so that the model always computes with
    the numbers that will be stored.
    """

    model: Decoder | Encoder
    """In float32, in eval mode, with `tokenizer` and the `bundle` it came from."""
    start: Path
    """The bundle that the pipeline began with: the usual teacher."""
    folder: Path
    """Of this stage, for what it keeps to go on from after a stop."""
    quantized: dict[str, QuantizedWeight] = dataclasses.field(default_factory=dict)
    """Weights that lie on a grid, by the model's own names of parameters."""
    kv: KVStorage | None = None
    """How keys and values are to be cached; None for what the engine takes by itself."""
    seed: int = 0
    report: Report = lambda words, share: None
    goes_on: Callable[[], None] = lambda: None
    """Called between pieces of long work; raises where the work is to stop."""

    def set_quantized(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Put weights on their grids, here and in the model."""
        for name, weight in weights.items():
            weight_of(self.model, name).copy_(weight.values())
            self.quantized[name] = weight
