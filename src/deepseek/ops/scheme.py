"""How the numbers of a model are stored and computed, as data. Loads no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

from deepseek.config import Config
from deepseek.errors import ConfigError, describe

Storage = Literal["float32", "bfloat16", "int8", "int4"]
KVStorage = Literal["float32", "bfloat16", "int8"]
Group = Literal[32, 64, 128, 192]

_NAMES: dict[str, dict[str, str | int | None]] = {
    "float32": {"weights": "float32", "kv": "float32"},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int8-g192": {"weights": "int8", "group": 192},
    "int8-row": {"weights": "int8", "group": None},
    "int4": {"weights": "int4", "head": "int8"},
    "int4-g64": {"weights": "int4", "head": "int8", "group": 64},
    "int4-g128": {"weights": "int4", "head": "int8", "group": 128},
}
_KV8 = "-kv8"

SCHEMES: tuple[str, ...] = (*_NAMES, *(f"{name}{_KV8}" for name in _NAMES if name != "float32"))
"""Every scheme that has a name."""


ROTATED = 64
"""Channels that int8 rotates together; at least so many share a scale, of weights and of inputs."""


def scaled_together(storage: Storage, group: int | None) -> int | None:
    """Return the channels of one scale when `group` is asked for: int8 has at least 64; None is a
    whole row."""
    return max(ROTATED, group) if storage == "int8" and group is not None else group


def stored_bits(storage: Storage, group: int | None = 32) -> float:
    """Return the bits that one weight takes in memory, scales included but for those of whole rows.

    Args:
        storage: of the weight.
        group: weights of one scale, integers only; int8 has at least 64, or None for a whole row.
    """
    return Form(storage, scaled_together(storage, group)).bits


def stored_width(storage: Storage, width: int, group: int | None = 32) -> int:
    """Return the channels of a weight as they are stored: `width`, padded to whole groups.

    Args:
        storage: of the weight.
        width: its input channels.
        group: weights of one scale, integers only; int8 has at least 64, or None for a whole row,
            which is padded to 64.
    """
    return Form(storage, scaled_together(storage, group)).width(width)


def cached_bytes(storage: KVStorage, head_dim: int) -> int:
    """Return the bytes that a key and a value of one token and KV head take, scales included.

    Args:
        storage: of keys and values; int8 has a float32 scale for each.
        head_dim: channels of a head.
    """
    values = 2 * head_dim
    return {"float32": 4 * values, "bfloat16": 2 * values, "int8": values + 8}[storage]


class Form(NamedTuple):
    """How the engine holds one weight, and so how it computes with it."""

    storage: Storage
    group: int | None = 1
    """Weights of one scale, integers only; None for a whole row."""
    is_rotated: bool = False
    """Whether every 64 channels are rotated before they are rounded, the inputs' too."""
    input_scale: float | None = None
    """Of all inputs, integers only; None for each row's and group's own."""

    @property
    def bits(self) -> float:
        """Bits that one weight takes in memory, scales included but for those of whole rows."""
        bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[self.storage]
        scales = {"int8": 16, "int4": 32}.get(self.storage, 0)
        return bits if self.group is None else bits + scales / self.group

    def width(self, width: int) -> int:
        """Return the channels of a weight as they are held: `width`, padded to whole groups, or a
        row to 64."""
        multiple = {"float32": 1, "bfloat16": 2}.get(self.storage, self.group or ROTATED)
        return -(-width // multiple) * multiple

    @property
    def text(self) -> str:
        """The form as a person reads it."""
        if self.storage not in ("int8", "int4"):
            return self.storage
        about = ", rotated" * self.is_rotated + ", inputs static" * (self.input_scale is not None)
        group = "by rows" if self.group is None else f"in groups of {self.group}"
        return f"{self.storage} {group}{about}"


def grid_form(
    bits: int,
    group: int,
    width: int,
    *,
    is_rotated: bool = False,
    input_scale: float | None = None,
) -> Form | None:
    """Return how the engine holds a weight on a grid with the numbers that the grid has; None where
    it cannot.

    Inputs share a scale by the same groups, so that one scale a row becomes groups of 64, unless
    inputs have one scale for ever.

    Args:
        bits: of a code: 4 or 8.
        group: channels of one scale.
        width: input channels.
        is_rotated: whether the codes are of channels behind the rotation of every 64: eight bits
            alone.
        input_scale: of all inputs; None for their own.
    """
    storage: Storage = "int4" if bits == 4 else "int8"
    if input_scale is not None and bits == 8 and group == width and width % ROTATED == 0:
        return Form(storage, None, is_rotated, input_scale)
    if is_rotated and (bits == 4 or width % ROTATED or group % ROTATED):
        return None
    held = _held_group(group, width)
    return None if held is None else Form(storage, held, is_rotated, input_scale)


def _held_group(group: int, width: int) -> int | None:
    if group in get_args(Group):
        return group
    if group == width or group % ROTATED == 0:
        return ROTATED
    return 32 if group % 32 == 0 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme(Config):
    """How the engine stores weights, embedding and cache, and so how it computes.

    int8: weights and inputs symmetric, a scale for every channel or row and group of 64 (or of
    `group`, where that is more or all), both after a Walsh-Hadamard rotation of every 64 channels,
    which spreads outliers. int4: weights on 16 levels between the least and the largest of a group;
    inputs int8 per row and group.
    """

    weights: Storage = "bfloat16"
    """Of every matrix of the layers."""
    head: Storage | None = None
    """Of the embedding and the head; None for as the weights."""
    group: Group | None = 32
    """Weights of one scale, integers only; int8 has at least 64, or None for one scale a row, which
    reads prompts fastest and loses more. A width that is no multiple of it is padded with zeros
    that are stored and multiplied too: 576 channels in groups of 128 cost as much as 640."""
    kv: KVStorage = "bfloat16"
    """Of cached keys and values; int8 has a scale per token and head."""
    as_stored: bool = False
    """Whether weights keep the form that a bundle of weights on grids has them in, which the other
    fields then say nothing of."""

    def __post_init__(self) -> None:
        if self.group is None and self.weights != "int8":
            raise ConfigError(describe("group", "Scheme", "given where weights are no int8", None))
        if self.group is not None and self.group not in get_args(Group):
            must = "one of " + ", ".join(map(str, get_args(Group)))
            raise ConfigError(describe("group", "Scheme", must, self.group))

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
        if self.as_stored:
            return "stored" + (_KV8 if self.kv == "int8" else "")
        for name in SCHEMES:
            if Scheme.named(name) == self:
                return name
        return f"{self.weights}-g{self.group or 'row'}-head-{self.head_storage}-kv-{self.kv}"

    def form_of(self, storage: Storage) -> Form:
        """Return how weights are held in a storage."""
        if storage in ("float32", "bfloat16"):
            return Form(storage)
        group = scaled_together(storage, self.group_of(storage))
        return Form(storage, group, storage == "int8")

    def group_of(self, storage: Storage) -> Group | None:
        """Return the group asked for in a storage: the layers' own, else the smallest there is."""
        return self.group if storage == self.weights else 32

    @property
    def head_storage(self) -> Storage:
        """Storage of the embedding and the head."""
        return self.head or self.weights
