"""Which stages there are, and the function that does each: the one table of this room."""

from __future__ import annotations

from deepseek.compress.distil.progressive import Progressive
from deepseek.compress.distil.stage import Distil
from deepseek.compress.distil.student import Student
from deepseek.compress.prune.sparsify import Sparsify
from deepseek.compress.prune.structured import Prune
from deepseek.compress.prune.vocabulary import PruneVocabulary
from deepseek.compress.qat.stage import QuantizeAware
from deepseek.compress.quantize.equalize import Equalize
from deepseek.compress.quantize.stage import Quantize
from deepseek.compress.quantize.static_inputs import StaticInputs

StageConfig = (
    Distil
    | Equalize
    | Progressive
    | Prune
    | PruneVocabulary
    | Quantize
    | QuantizeAware
    | Sparsify
    | StaticInputs
    | Student
)

APPLY: dict[type, str] = {
    Distil: "deepseek.compress.distil.stage:distil",
    Equalize: "deepseek.compress.quantize.equalize:apply",
    Progressive: "deepseek.compress.distil.progressive:progress",
    Prune: "deepseek.compress.prune.structured:apply",
    PruneVocabulary: "deepseek.compress.prune.vocabulary:apply",
    Quantize: "deepseek.compress.quantize.stage:apply",
    QuantizeAware: "deepseek.compress.qat.stage:quantize_aware",
    Sparsify: "deepseek.compress.prune.sparsify:apply",
    StaticInputs: "deepseek.compress.quantize.static_inputs:apply",
    Student: "deepseek.compress.distil.student:make_student",
}
"""Module and function that do a stage: they take the stage and the `Work`, change it, and return
what they measured."""
