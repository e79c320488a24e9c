"""What adapter_config.json of PEFT says, as far as it is computed here; all else is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek.errors import FormatError, describe

_READ = frozenset(
    (
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    )
)
_INERT = frozenset(
    (
        "auto_mapping",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    )
)
"""Fields that change nothing of what the saved matrices compute. A field in neither set must be
empty: PEFT gains new ones with every release, and each may be a method of its own."""
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the matrices of the base as they are."""
_MOST_ALPHA = 1e9
_NAMES = re.compile(r"\^?[\w.]+")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Ranks and scales of an adapter's modules."""

    path: Path
    rank: int
    alpha: float
    has_root_scale: bool
    """Whether scales are `alpha / sqrt(rank)`. Source: Kalajdzievski 2023 (2312.03732)."""
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    """By the ends of modules' names, where they differ."""
    targets: tuple[str, ...] | None
    """Ends of the names of the modules; None where a pattern says which."""
    base: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return _of_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor on a module's update."""
        rank = self.rank_of(module)
        alpha = _of_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.has_root_scale else rank)

    def check_target(self, module: str) -> None:
        """Refuse a module that is no target.

        Raises:
            FormatError: it is none.
        """
        if self.targets is not None and not any(_ends(module, name) for name in self.targets):
            must = f"one of target_modules, {', '.join(self.targets)}"
            raise FormatError(describe("module", str(self.path.parent), must, module))


def read_adapter_config(path: Path, content: object) -> AdapterConfig:
    """Return what a config says.

    Args:
        path: of the file, for errors.
        content: its JSON.

    Raises:
        FormatError: a field is missing or has a wrong value, or asks for what is not computed here.
    """
    if not isinstance(content, dict):
        raise FormatError(describe("content", str(path), "a table", content))
    fields: dict[str, Any] = content
    _refuse_other_methods(path, fields)
    base = fields.get("base_model_name_or_path")
    return AdapterConfig(
        path=path,
        rank=_rank(path, "r", fields.get("r")),
        alpha=_number(path, "lora_alpha", fields.get("lora_alpha")),
        has_root_scale=_flag(path, "use_rslora", fields.get("use_rslora", False)),
        ranks=_pattern(path, "rank_pattern", fields, _rank),
        alphas=_pattern(path, "alpha_pattern", fields, _number),
        targets=_targets(path, fields.get("target_modules")),
        base=base if isinstance(base, str) else None,
    )


def _refuse_other_methods(path: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise FormatError(describe("peft_type", str(path), "LORA", fields.get("peft_type")))
    if fields.get("bias", "none") != "none":
        step = "Trained biases are no part of a low-rank update: merge it into its base"
        raise FormatError(describe("bias", str(path), "none", fields["bias"], step))
    start = fields.get("init_lora_weights", True)
    if not any(start is each or (each == start and isinstance(start, str)) for each in _KEEPS_BASE):
        step = "It changes the base: save it with path_initial_model_for_weight_conversion"
        raise FormatError(describe("init_lora_weights", str(path), "true", start, step))
    for name, value in fields.items():
        if name not in _READ and name not in _INERT and value not in (None, False, 0, "", [], {}):
            step = "This method is not computed beside a base: merge it into a model"
            raise FormatError(describe(name, str(path), "left out", value, step))


def _rank(path: Path, name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise FormatError(describe(name, str(path), "a rank of at least 1", value))
    return value


def _number(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int | float) or value is True or value is False:
        raise FormatError(describe(name, str(path), "a number", value))
    if not abs(value) < _MOST_ALPHA:
        raise FormatError(describe(name, str(path), f"within {_MOST_ALPHA:g}", value))
    return float(value)


def _flag(path: Path, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise FormatError(describe(name, str(path), "true or false", value))
    return value


def _pattern(path: Path, name: str, fields: Mapping[str, Any], read: Any) -> dict[str, Any]:
    table = fields.get(name) or {}
    if not isinstance(table, dict):
        raise FormatError(describe(name, str(path), "a table", table))
    for key in table:
        if _NAMES.fullmatch(key) is None:
            step = "Other patterns are not run: they come with a file"
            raise FormatError(
                describe(f"key of {name}", str(path), "the end of a module's name", key, step)
            )
    return {key: read(path, f"{name}[{key!r}]", value) for key, value in table.items()}


def _targets(path: Path, value: object) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise FormatError(describe("target_modules", str(path), "a list of names", value))
    return tuple(value)


def _of_pattern(table: Mapping[str, Any], module: str, other: Any) -> Any:
    """Return the value of the first key that fits, as PEFT does."""
    for key, value in table.items():
        if module == key[1:] if key.startswith("^") else _ends(module, key):
            return value
    return other


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
