"""Training in stages: exact data, exact resume, on one worker or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.train.classifier import ClassifierSettings, fit_classifier
    from deepseek.train.config import ExitLoss, LowRank, Run, Source, Stage, read_run
    from deepseek.train.loop import Progress
    from deepseek.train.start import prove_run, train
    from deepseek.train.stopping import Interrupted

__all__ = [
    "ClassifierSettings",
    "ExitLoss",
    "Interrupted",
    "LowRank",
    "Progress",
    "Run",
    "Source",
    "Stage",
    "fit_classifier",
    "prove_run",
    "read_run",
    "train",
]

_HOMES = {
    "ClassifierSettings": "classifier",
    "ExitLoss": "config",
    "Interrupted": "stopping",
    "LowRank": "config",
    "Progress": "loop",
    "Run": "config",
    "Source": "config",
    "Stage": "config",
    "fit_classifier": "classifier",
    "prove_run": "start",
    "read_run": "config",
    "train": "start",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
