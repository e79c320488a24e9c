"""Choosing the next token: penalties, filters and the draw. Importing this loads no torch.

`reference` is the specification in plain PyTorch; `choose` is the same in fewer operations, and
`native` the same in C++ for logits of the flat step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.ops.sampling.config import Sampling
from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.ops.sampling.api import choose, choose_greedy
    from deepseek.ops.sampling.history import TokenHistory

__all__ = ["Sampling", "TokenHistory", "choose", "choose_greedy"]

_PLACES = {"TokenHistory": "history", "choose": "api", "choose_greedy": "api"}

__getattr__, __dir__ = lazy_names(__name__, _PLACES, __all__)
