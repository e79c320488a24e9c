"""Training in stages: exact data, exact resume, on one worker or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.train.classifier import ClassifierSettings, fit_classifier
    from deepseek.train.config import ExitLoss, LowRank, Run, Source, Stage, read_run
    from deepseek.train.loop import Progress
    from deepseek.train.objective import Objective, Part
    from deepseek.train.start import prove_run, train, train_model
    from deepseek.train.stopping import Interrupted

__all__ = [
    "ClassifierSettings",
    "ExitLoss",
    "Interrupted",
    "LowRank",
    "Objective",
    "Part",
    "Progress",
    "Run",
    "Source",
    "Stage",
    "fit_classifier",
    "prove_run",
    "read_run",
    "train",
    "train_model",
]

_HOMES = {
    "ClassifierSettings": "classifier",
    "ExitLoss": "config",
    "Interrupted": "stopping",
    "LowRank": "config",
    "Objective": "objective",
    "Part": "objective",
    "Progress": "loop",
    "Run": "config",
    "Source": "config",
    "Stage": "config",
    "fit_classifier": "classifier",
    "prove_run": "start",
    "read_run": "config",
    "train": "start",
    "train_model": "start",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
