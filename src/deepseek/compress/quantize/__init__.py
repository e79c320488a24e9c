"""Weights on a grid of integers: which grid, and which of its points each number becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.compress.quantize.end_to_end import EndToEnd
    from deepseek.compress.quantize.equalize import Equalize
    from deepseek.compress.quantize.learned import Learned
    from deepseek.compress.quantize.mixed import MixedBits
    from deepseek.compress.quantize.stage import Quantize
    from deepseek.compress.quantize.static_inputs import StaticInputs

__all__ = ["EndToEnd", "Equalize", "Learned", "MixedBits", "Quantize", "StaticInputs"]

_HOMES = {
    "EndToEnd": "end_to_end",
    "Equalize": "equalize",
    "Learned": "learned",
    "MixedBits": "mixed",
    "Quantize": "stage",
    "StaticInputs": "static_inputs",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
