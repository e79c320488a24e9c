"""Several processes as one: who is there, how a model is divided over them, and sums that do not
depend on how many they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.parallel.base import Transport
from deepseek.parallel.launch import run_workers
from deepseek.parallel.mesh import AXES, Grid, Mesh
from deepseek.parallel.overlap import EarlySum
from deepseek.parallel.payoff import Estimate, Job, estimate, pays_below, wire_bytes
from deepseek.parallel.transport import Exact, Sparse24, TransportConfig, open_transport
from deepseek.parallel.tree import PairwiseSum, TreeSum, pairwise_sum
from deepseek.parallel.world import World, joined_world
from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.parallel.gradients import GradientSum, gradient_of, local_of
    from deepseek.parallel.pipeline import Pipeline
    from deepseek.parallel.shards import shard_model
    from deepseek.parallel.splits import MEANINGS, Rule, SplitTable, split_model
    from deepseek.parallel.whole import whole_state

__all__ = [
    "AXES",
    "MEANINGS",
    "EarlySum",
    "Estimate",
    "Exact",
    "GradientSum",
    "Grid",
    "Job",
    "Mesh",
    "PairwiseSum",
    "Pipeline",
    "Rule",
    "Sparse24",
    "SplitTable",
    "Transport",
    "TransportConfig",
    "TreeSum",
    "World",
    "estimate",
    "gradient_of",
    "joined_world",
    "local_of",
    "open_transport",
    "pairwise_sum",
    "pays_below",
    "run_workers",
    "shard_model",
    "split_model",
    "whole_state",
    "wire_bytes",
]

# PyTorch's distributed tensors take a second to import, and only a divided model needs them.
_PLACES = {
    "MEANINGS": "splits",
    "GradientSum": "gradients",
    "Pipeline": "pipeline",
    "Rule": "splits",
    "SplitTable": "splits",
    "gradient_of": "gradients",
    "local_of": "gradients",
    "shard_model": "shards",
    "split_model": "splits",
    "whole_state": "whole",
}

__getattr__, __dir__ = lazy_names(__name__, _PLACES, __all__)
