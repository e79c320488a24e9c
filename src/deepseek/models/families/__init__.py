"""The families: how each decoder and encoder is named and laid out in a Hugging Face folder, as
tables. Importing this loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deepseek.models.families.table import (
    config_from_hf,
    config_to_hf,
    known_families,
    our_name,
    their_name,
)

if TYPE_CHECKING:
    from deepseek.models.families.build import build_model, state_from_hf, state_to_hf

__all__ = [
    "build_model",
    "config_from_hf",
    "config_to_hf",
    "known_families",
    "our_name",
    "state_from_hf",
    "state_to_hf",
    "their_name",
]

_WITH_TORCH = frozenset({"build_model", "state_from_hf", "state_to_hf"})


def __getattr__(name: str) -> object:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module("deepseek.models.families.build"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
