"""Optimizers, and learning rates over the steps of a stage."""

from __future__ import annotations

from deepseek.optim.mixed_precision import MixedPrecisionTrainer
from deepseek.optim.optimizer import AdamW, Muon, OptimizerConfig, build_optimizers
from deepseek.optim.schedule import Constant, Cosine, ScheduleConfig, WarmupStableDecay

__all__ = [
    "AdamW",
    "Constant",
    "Cosine",
    "MixedPrecisionTrainer",
    "Muon",
    "OptimizerConfig",
    "ScheduleConfig",
    "WarmupStableDecay",
    "build_optimizers",
]
