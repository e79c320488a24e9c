"""Which way gradients go from worker to worker, as settings."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.parallel.base import Transport
from deepseek.parallel.sparse import SparseSum
from deepseek.parallel.tree import TreeSum
from deepseek.parallel.world import World


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Config):
    """In float32, as they are, so that the number of workers does not show in the bits."""

    kind: Literal["exact"] = "exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse24(Config):
    """Of every four neighbours the two of largest magnitude, in few bits, with error feedback."""

    kind: Literal["sparse24"] = "sparse24"
    values: Literal["float8", "bfloat16"] = "float8"
    """What the kept values are sent as: 5.03 or 9 bits for each value, kept or not."""
    feedback: float = 0.25
    """Share of what is not sent that is added to the next step's gradient, from 0 to 1. With 1
    nothing is lost, as an optimizer that is linear in its gradients wants it; AdamW, which divides
    by their recent size, learns more slowly from what comes late and at once."""

    def __post_init__(self) -> None:
        if not 0 <= self.feedback <= 1:
            raise ConfigError(describe("feedback", "Sparse24", "from 0 to 1", self.feedback))


TransportConfig = Exact | Sparse24


def open_transport(config: TransportConfig, world: World) -> Transport:
    """Return what adds up gradients over the workers; every worker must do so together.

    Args:
        config: the way they go.
        world: the workers.
    """
    if isinstance(config, Sparse24):
        return SparseSum(world, config.values, config.feedback)
    return TreeSum(world)
