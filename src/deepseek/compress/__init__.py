"""Make a model smaller or faster, in stages that are ordered, resumed and proved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.compress.calibration import Calibration
    from deepseek.compress.stage import Stage
    from deepseek.compress.work import Work

__all__ = ["Calibration", "Stage", "Work"]

_HOMES = {"Calibration": "calibration", "Stage": "stage", "Work": "work"}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
