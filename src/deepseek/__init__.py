"""Takes a small or mid-sized model through its whole life on the machines you have.

    model = deepseek.load("smollm2-135m")
    print(model.generate("The capital of France is", max_tokens=8).text)

Importing this package loads neither torch nor transformers; each name below is fetched on first
use.
"""

from __future__ import annotations

import importlib
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

    __version__: str

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

_FROM_FACE = frozenset({"load", "pull", "save"})

# The one act at import: `AutoModelForCausalLM` must know our models once both packages are
# imported.
register_when_imported()


def __getattr__(name: str) -> object:
    if name in _FROM_FACE:
        return getattr(importlib.import_module("deepseek.face"), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    # looked up when asked for: reading installed packages' metadata takes longer than all the rest
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("deepseek-stack")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
