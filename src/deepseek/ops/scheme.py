"""How the numbers of a model are stored and computed, as data. Loads no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deepseek.config import Config
from deepseek.errors import ConfigError, describe

Storage = Literal["float32", "bfloat16", "int8", "int4"]
KVStorage = Literal["float32", "bfloat16", "int8"]

_NAMES: dict[str, dict[str, str | int]] = {
    "float32": {"weights": "float32", "kv": "float32"},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "head": "int8"},
    "int4-g64": {"weights": "int4", "head": "int8", "group": 64},
}
_KV8 = "-kv8"

SCHEMES: tuple[str, ...] = (*_NAMES, *(f"{name}{_KV8}" for name in _NAMES if name != "float32"))
"""Every scheme that has a name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme(Config):
    """How the engine stores weights, embedding and cache, and so how it computes.

    int8: weights and inputs symmetric, a scale for every channel or row and group of 64, both after
    a Walsh-Hadamard rotation of every 64 channels, which spreads outliers. int4: weights on 16
    levels between the least and the largest of a group; inputs int8 per row and group.
    """

    weights: Storage = "bfloat16"
    """Of every matrix of the layers."""
    head: Storage | None = None
    """Of the embedding and the head; None for as the weights."""
    group: Literal[32, 64, 128] = 32
    """Weights of one scale, int4 only."""
    kv: KVStorage = "bfloat16"
    """Of cached keys and values; int8 has a scale per token and head."""

    @classmethod
    def named(cls, name: str) -> Scheme:
        """Return the scheme of a name, such as `int4` or `int8-kv8`.

        Raises:
            ConfigError: no scheme has it.
        """
        if name not in SCHEMES:
            raise ConfigError(describe("scheme", "Scheme", f"one of {', '.join(SCHEMES)}", name))
        values: dict[str, object] = dict(_NAMES[name.removesuffix(_KV8)])
        if name.endswith(_KV8):
            values["kv"] = "int8"
        return cls.from_dict(values)

    @property
    def name(self) -> str:
        """The name of the scheme, or what it is made of where none stands for it."""
        for name in SCHEMES:
            if Scheme.named(name) == self:
                return name
        return f"{self.weights}-g{self.group}-head-{self.head_storage}-kv-{self.kv}"

    @property
    def head_storage(self) -> Storage:
        """Storage of the embedding and the head."""
        return self.head or self.weights
