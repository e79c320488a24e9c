"""Make a model smaller or faster, in stages that are ordered, resumed and proved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.compress.calibration import Calibration
    from deepseek.compress.gates import SizeGate, SpeedGate, TaskGate, TextGate
    from deepseek.compress.pipeline import Pipeline, read_pipeline, usual_gates
    from deepseek.compress.quantize.config import Quantize
    from deepseek.compress.run import Compressed, compress
    from deepseek.compress.stage import Stage
    from deepseek.compress.work import Work

__all__ = [
    "Calibration",
    "Compressed",
    "Pipeline",
    "Quantize",
    "SizeGate",
    "SpeedGate",
    "Stage",
    "TaskGate",
    "TextGate",
    "Work",
    "compress",
    "read_pipeline",
    "usual_gates",
]

_HOMES = {
    "Calibration": "calibration",
    "Compressed": "run",
    "Pipeline": "pipeline",
    "Quantize": "quantize.config",
    "SizeGate": "gates",
    "SpeedGate": "gates",
    "Stage": "stage",
    "TaskGate": "gates",
    "TextGate": "gates",
    "Work": "work",
    "compress": "run",
    "read_pipeline": "pipeline",
    "usual_gates": "pipeline",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
