"""What of a model lies on a grid: its products and embeddings, layer by layer, unit by unit."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder
from deepseek.models.layers import ExpertWeights

Model = Decoder | Encoder

_TOGETHER = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"query", "key", "value"}),
)
"""Products of the same inputs that are one instruction of the engine."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Products of the same inputs that have their bits together."""

    layer: int | None
    """The layer it lies in; None for embeddings, the head and a pooler."""
    modules: tuple[str, ...]
    """By name."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of their parameters."""
        return tuple(f"{name}.weight" for name in self.modules)


def layers_of(model: Model) -> tuple[str, Sequence[nn.Module]]:
    """Return the prefix of the layers' names, and the layers."""
    if isinstance(model, Encoder):
        return "encoder.layer", list(model.encoder.layer)
    return "model.layers", list(model.model.layers)


def units(model: Model, ignore: Sequence[str] = ()) -> list[Unit]:
    """Return the units of a model, in the order of its pass; a weight that two modules share is in
    the first alone.

    Args:
        model: all its products and embeddings are meant.
        ignore: patterns (`*`, `?`) of names of weights that stay as they are.

    Raises:
        ConfigError: nothing is left, or it has routed experts.
    """
    if any(isinstance(module, ExpertWeights) for module in model.modules()):
        must = "without routed experts, which have no grid here"
        raise ConfigError(describe("model", "Quantize", must, type(model).__name__))
    prefix, _ = layers_of(model)
    found: dict[tuple[int | None, str], list[str]] = {}
    for name in _modules(model, ignore):
        parent, _, last = name.rpartition(".")
        layer = int(name.removeprefix(f"{prefix}.").split(".")[0]) if prefix in name else None
        shared = next((i for i, names in enumerate(_TOGETHER) if last in names), None)
        found.setdefault((layer, name if shared is None else f"{parent}.{shared}"), []).append(name)
    if not found:
        must = "patterns that leave a weight"
        raise ConfigError(describe("ignore", "Quantize", must, tuple(ignore)))
    return [Unit(layer, tuple(names)) for (layer, _), names in found.items()]


def _modules(model: Model, ignore: Sequence[str]) -> Iterator[str]:
    parameters = dict(model.named_parameters())  # each once
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        is_meant = isinstance(module, nn.Linear | nn.Embedding) and weight in parameters
        if is_meant and not any(fnmatch.fnmatchcase(weight, each) for each in ignore):
            yield name
