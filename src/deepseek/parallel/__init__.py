"""Several processes as one: who is there, and sums over them that do not depend on how many."""

from __future__ import annotations

from deepseek.parallel.launch import run_workers
from deepseek.parallel.tree import TreeSum, pairwise_sum
from deepseek.parallel.world import World, joined_world

__all__ = ["TreeSum", "World", "joined_world", "pairwise_sum", "run_workers"]
