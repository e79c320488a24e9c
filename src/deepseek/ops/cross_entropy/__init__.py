"""The loss of a vocabulary without its logits."""

from __future__ import annotations

from deepseek.ops.cross_entropy.chunked import linear_cross_entropy
from deepseek.ops.cross_entropy.reference import IGNORED, linear_cross_entropy_reference

__all__ = ["IGNORED", "linear_cross_entropy", "linear_cross_entropy_reference"]
