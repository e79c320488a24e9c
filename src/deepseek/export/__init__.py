"""Models for other runtimes, in the formats that those read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.export.gguf import write_gguf

__all__ = ["write_gguf"]

_HOMES = {"write_gguf": "gguf"}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
