"""Make a model smaller or faster, in stages that are ordered, resumed and proved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.compress.calibration import Calibration
    from deepseek.compress.distil.imitation import Imitation
    from deepseek.compress.distil.progressive import Progressive
    from deepseek.compress.distil.stage import Distil
    from deepseek.compress.distil.student import Student
    from deepseek.compress.qat.stage import QuantizeAware
    from deepseek.compress.stage import Stage
    from deepseek.compress.work import Work

__all__ = [
    "Calibration",
    "Distil",
    "Imitation",
    "Progressive",
    "QuantizeAware",
    "Stage",
    "Student",
    "Work",
]

_HOMES = {
    "Calibration": "calibration",
    "Distil": "distil.stage",
    "Imitation": "distil.imitation",
    "Progressive": "distil.progressive",
    "QuantizeAware": "qat.stage",
    "Stage": "stage",
    "Student": "distil.student",
    "Work": "work",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
