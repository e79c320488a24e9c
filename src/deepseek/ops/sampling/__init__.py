"""Choosing the next token: penalties, filters and the draw. Importing this loads no torch.

`reference` is the specification in plain PyTorch; `choose` is the same in fewer operations, and
`native` the same in C++ for logits of the flat step.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deepseek.ops.sampling.config import Sampling

if TYPE_CHECKING:
    from deepseek.ops.sampling.api import choose, choose_greedy
    from deepseek.ops.sampling.history import TokenHistory

__all__ = ["Sampling", "TokenHistory", "choose", "choose_greedy"]

_PLACES = {"TokenHistory": "history", "choose": "api", "choose_greedy": "api"}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
