"""What of a model lies on a grid: its products and embeddings, layer by layer, unit by unit."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from deepseek.compress.quantize.experts import stacks_of
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder

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
    """By name; of routed experts, each of them: those that read a layer's states are one unit,
    those that give its outputs another."""
    is_routed: bool = False
    """Whether these are products of routed experts."""

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
        ConfigError: nothing is left.
    """
    prefix, _ = layers_of(model)
    stacks = stacks_of(model)
    found: dict[tuple[int | None, str], list[str]] = {}
    routed: set[tuple[int | None, str]] = set()
    for name in _modules(model):
        if any(fnmatch.fnmatchcase(f"{name}.weight", each) for each in ignore):
            continue
        parent, _, last = name.rpartition(".")
        layer = int(name.removeprefix(f"{prefix}.").split(".")[0]) if prefix in name else None
        shared = next((i for i, names in enumerate(_TOGETHER) if last in names), None)
        stack = parent.rpartition(".")[0]
        if stack in stacks:
            key = layer, f"{stack}.{last if shared is None else shared}"
            routed.add(key)
        else:
            key = layer, name if shared is None else f"{parent}.{shared}"
        found.setdefault(key, []).append(name)
    if not found:
        must = "patterns that leave a weight"
        raise ConfigError(describe("ignore", "Quantize", must, tuple(ignore)))
    return [Unit(key[0], tuple(names), key in routed) for key, names in found.items()]


def _modules(model: Model) -> Iterator[str]:
    """Yield the names of products and embeddings, those of experts one by one."""
    parameters = dict(model.named_parameters())  # each once
    stacks = stacks_of(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and f"{name}.weight" in parameters:
            yield name
        elif name in stacks:
            for expert in range(len(stacks[name].down_proj)):
                yield from (f"{name}.{expert}.{part}_proj" for part in ("gate", "up", "down"))
