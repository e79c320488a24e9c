"""How far a head's predictions are from a teacher's, without either's logits."""

from __future__ import annotations

from deepseek.ops.distillation.chunked import linear_divergence
from deepseek.ops.distillation.reference import linear_divergence_reference

__all__ = ["linear_divergence", "linear_divergence_reference"]
