"""Which stages there are, and the function that does each: the one table of this room."""

from __future__ import annotations

from deepseek.compress.quantize import Quantize

StageConfig = Quantize

APPLY: dict[type, str] = {Quantize: "deepseek.compress.quantize.apply:apply"}
"""Module and function that do a stage: they take the stage and the `Work`, change it, and return
what they measured."""
