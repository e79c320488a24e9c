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
    from deepseek.compress.gates import LabelGate, SizeGate, SpeedGate, TaskGate, TextGate
    from deepseek.compress.pipeline import Pipeline, read_pipeline, usual_gates
    from deepseek.compress.prune.sparsify import Sparsify
    from deepseek.compress.prune.structured import Prune
    from deepseek.compress.prune.vocabulary import PruneVocabulary
    from deepseek.compress.qat.stage import QuantizeAware
    from deepseek.compress.quantize.end_to_end import EndToEnd
    from deepseek.compress.quantize.equalize import Equalize
    from deepseek.compress.quantize.learned import Learned
    from deepseek.compress.quantize.mixed import MixedBits
    from deepseek.compress.quantize.stage import Quantize
    from deepseek.compress.quantize.static_inputs import StaticInputs
    from deepseek.compress.run import Compressed, compress
    from deepseek.compress.stage import Stage
    from deepseek.compress.work import Work

__all__ = [
    "Calibration",
    "Compressed",
    "Distil",
    "EndToEnd",
    "Equalize",
    "Imitation",
    "LabelGate",
    "Learned",
    "MixedBits",
    "Pipeline",
    "Progressive",
    "Prune",
    "PruneVocabulary",
    "Quantize",
    "QuantizeAware",
    "SizeGate",
    "Sparsify",
    "SpeedGate",
    "Stage",
    "StaticInputs",
    "Student",
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
    "Distil": "distil.stage",
    "EndToEnd": "quantize.end_to_end",
    "Equalize": "quantize.equalize",
    "Imitation": "distil.imitation",
    "LabelGate": "gates",
    "Learned": "quantize.learned",
    "MixedBits": "quantize.mixed",
    "Pipeline": "pipeline",
    "Progressive": "distil.progressive",
    "Prune": "prune.structured",
    "PruneVocabulary": "prune.vocabulary",
    "Quantize": "quantize.stage",
    "QuantizeAware": "qat.stage",
    "SizeGate": "gates",
    "Sparsify": "prune.sparsify",
    "SpeedGate": "gates",
    "Stage": "stage",
    "StaticInputs": "quantize.static_inputs",
    "Student": "distil.student",
    "TaskGate": "gates",
    "TextGate": "gates",
    "Work": "work",
    "compress": "run",
    "read_pipeline": "pipeline",
    "usual_gates": "pipeline",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
