"""Takes a small or mid-sized model through its whole life on the machines you have.

    model = deepseek.load("smollm2-135m")
    print(model.generate("The capital of France is", max_tokens=8).text)

Importing this package loads neither torch nor transformers; each name below is fetched on first
use.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from deepseek.autoclasses import register_when_imported
from deepseek.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    DeepseekError,
    FormatError,
    MissingExtra,
    ShapeError,
    VerifyError,
)
from deepseek.records import Measurement

if TYPE_CHECKING:
    from deepseek.face import load, pull, save

__all__ = [
    "BackendError",
    "CapacityError",
    "ConfigError",
    "DeepseekError",
    "FormatError",
    "Measurement",
    "MissingExtra",
    "ShapeError",
    "VerifyError",
    "__version__",
    "load",
    "pull",
    "save",
]

try:
    __version__ = version("deepseek-stack")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

_FROM_FACE = frozenset({"load", "pull", "save"})

# The one act at import: `AutoModelForCausalLM` must know our models once both packages are
# imported.
register_when_imported()


def __getattr__(name: str) -> object:
    if name in _FROM_FACE:
        return getattr(importlib.import_module("deepseek.face"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
