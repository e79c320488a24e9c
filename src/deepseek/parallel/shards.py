"""Sharded data parallelism: weights, gradients and moments divided, a layer gathered when it
computes (FSDP2)."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from deepseek.parallel.mesh import Grid


def shard_model(model: nn.Module, units: Sequence[str], grid: Grid) -> None:
    """Divide every parameter along the axis `shard`, in place, after `split_model`.

    Gradients come out of the backward pass added up along that axis, not averaged.

    Args:
        model: what is called for a forward pass.
        units: patterns of the names of modules that are gathered by themselves; what is in none of
            them is gathered while the whole computes.
        grid: the mesh; with one process along the axis nothing changes.
    """
    if grid.size("shard") == 1:
        return
    mesh = grid.along("shard")
    for name, module in model.named_modules():
        named = any(fnmatch.fnmatchcase(name, unit) for unit in units)
        if named and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
