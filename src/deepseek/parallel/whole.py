"""The whole of a divided model's weights, on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from deepseek.parallel.mesh import Grid


def whole_state(model: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """Return every weight and buffer whole on the first process, nothing on the others.

    All call it together. Stages send theirs one after another, a tensor at a time. What the first
    process holds whole is not copied: it changes with the model.

    Args:
        model: divided; names as in the whole one.
        grid: the mesh.
    """
    own: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        full = _gathered(value) if isinstance(value, DTensor) else value
        if grid.is_first_of_stage:
            own[name] = full
    if not grid.is_first_of_stage:
        return {}
    if grid.size("pipeline") == 1:
        return own
    group, place = grid.group("pipeline"), grid.place("pipeline")
    listed: list[list[tuple[str, torch.Size, torch.dtype]]] = [[]] * group.size()
    facts = [(name, value.shape, value.dtype) for name, value in own.items()]
    dist.all_gather_object(listed, facts, group=group)
    first = dist.get_global_rank(group, 0)
    for stage in range(1, group.size()):
        for name, shape, dtype in listed[stage]:
            if place == stage:
                dist.send(own[name].contiguous(), first, group=group)
            elif place == 0:
                own[name] = torch.empty(shape, dtype=dtype)
                dist.recv(own[name], dist.get_global_rank(group, stage), group=group)
    return own if place == 0 else {}


def _gathered(value: DTensor) -> Tensor:
    """Return the whole of a tensor, gathered along one axis after another."""
    placements = list(value.placements)
    # what was cut last is joined first: the shards of FSDP, which lie across, then the inner axes
    last_cut = [axis for axis, how in enumerate(placements) if not how.is_shard()]
    last_cut += [axis for axis in reversed(range(len(placements))) if axis not in last_cut]
    for axis in last_cut:
        placements[axis] = Replicate()
        value = value.redistribute(placements=placements)
    return value.to_local()
