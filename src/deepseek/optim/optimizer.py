"""Optimizers as data, built over the parameters of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from deepseek.config import Config
from deepseek.errors import ConfigError, describe


def _check_rate(rate: float, owner: str) -> None:
    if not 0 < rate < float("inf"):
        raise ConfigError(describe("rate", owner, "a positive number", rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Config):
    """Decoupled weight decay (Loshchilov and Hutter, 1711.05101); vectors do not decay."""

    kind: Literal["adamw"] = "adamw"
    rate: float = 3e-4
    """Largest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _check_rate(self.rate, "AdamW")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Config):
    """Momentum whose matrices are orthogonalized (Jordan et al., 2024), as `torch.optim.Muon`.

    Matrices of the layers go to it; embedding, head and vectors go to AdamW.
    """

    kind: Literal["muon"] = "muon"
    rate: float = 3e-4
    """Largest learning rate of AdamW, and of Muon, whose updates are scaled to AdamW's size
    (Liu et al., 2502.16982, equation 4)."""
    momentum: float = 0.95
    weight_decay: float = 0.1
    adamw: AdamW = dataclasses.field(default_factory=AdamW)
    """Of the rest; its rate is not used."""

    def __post_init__(self) -> None:
        _check_rate(self.rate, "Muon")


OptimizerConfig = AdamW | Muon

_NOT_HIDDEN = ("embed_tokens", "lm_head", "embeddings")


def build_optimizers(
    config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]
) -> list[Optimizer]:
    """Return the optimizers of named parameters; each belongs to exactly one.

    Raises:
        ConfigError: there is nothing to train.
    """
    named = list(parameters)
    if not named:
        raise ConfigError(describe("parameters", "the optimizer", "at least one", "none"))
    if isinstance(config, AdamW):
        return [_adamw(config, named, config.rate)]
    hidden = [
        (n, p) for n, p in named if p.ndim == 2 and not any(part in n for part in _NOT_HIDDEN)
    ]
    taken = {name for name, _ in hidden}
    rest = [(name, value) for name, value in named if name not in taken]
    found: list[Optimizer] = []
    if hidden:
        found.append(
            torch.optim.Muon(
                [value for _, value in hidden],
                lr=config.rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        found.append(_adamw(config.adamw, rest, config.rate))
    return found


def _adamw(config: AdamW, named: list[tuple[str, nn.Parameter]], rate: float) -> Optimizer:
    groups: dict[object, dict[str, Any]] = {}
    for _, value in named:
        decay = config.weight_decay if value.ndim > 1 else 0.0
        # values of a divided model are updated with those that are divided over the same processes
        key = (decay, getattr(value, "device_mesh", None))
        groups.setdefault(key, {"params": [], "weight_decay": decay})["params"].append(value)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
