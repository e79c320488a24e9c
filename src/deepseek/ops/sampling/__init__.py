"""Choosing the next token: penalties, filters and the draw.

`reference` is the specification in plain PyTorch; `choose` is the same in fewer operations.
"""

from __future__ import annotations

from deepseek.ops.sampling.api import choose, choose_greedy
from deepseek.ops.sampling.config import Sampling
from deepseek.ops.sampling.history import TokenHistory

__all__ = ["Sampling", "TokenHistory", "choose", "choose_greedy"]
