"""Training in stages: exact data, exact resume, on one worker or several."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek.train.config import LowRank, Run, Source, Stage, read_run
    from deepseek.train.loop import Interrupted, Progress
    from deepseek.train.start import prove_run, train

__all__ = [
    "Interrupted",
    "LowRank",
    "Progress",
    "Run",
    "Source",
    "Stage",
    "prove_run",
    "read_run",
    "train",
]

# No module is named like what it gives: importing it would hide the function in this room.
_HOMES = {
    "Interrupted": "loop",
    "LowRank": "config",
    "Progress": "loop",
    "Run": "config",
    "Source": "config",
    "Stage": "config",
    "prove_run": "start",
    "read_run": "config",
    "train": "start",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
