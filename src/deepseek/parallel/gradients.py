"""Gradients of a divided model: added up where several processes have a part of them, and measured
as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek.parallel.mesh import Grid


class GradientSum:
    """Adds up gradients over a mesh, in place, and gives the norm of the whole."""

    def __init__(
        self,
        grid: Grid,
        parameters: Sequence[tuple[str, nn.Parameter]],
        axes: Mapping[str, Sequence[str]],
    ) -> None:
        """Learn who holds what; every process must do so together.

        Args:
            grid: the mesh.
            parameters: of this process, divided, by name.
            axes: of each, as `split_model` returns them.
        """
        self._grid = grid
        self._axes = [tuple(axes[name]) for name, _ in parameters]
        self._holders = _holders(grid, [name for name, _ in parameters])
        self._copies = [
            grid.world.size / _num_parts(grid, value, len(held))
            for (_, value), held in zip(parameters, self._holders, strict=True)
        ]

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the processes that have a part of it.

        Args:
            gradients: of the parameters, in their order; divided as they are.
        """
        local = [local_of(gradient) for gradient in gradients]
        for axes in sorted(set(self._axes)):
            same = [each for each, mine in zip(local, self._axes, strict=True) if mine == axes]
            self._grid.sum(same, axes)
        for gradient, holders in zip(local, self._holders, strict=True):
            if len(holders) > 1:
                self._sum_over_stages(gradient, holders)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of the whole gradient, alike on every process, float32 scalar.

        Args:
            gradients: added up.
        """
        total = torch.zeros((), dtype=torch.float64)
        for gradient, copies in zip(gradients, self._copies, strict=True):
            total += torch.linalg.vector_norm(local_of(gradient)).double() ** 2 / copies
        if self._grid.world.size > 1:
            dist.all_reduce(total)
        return total.sqrt().float()

    def _sum_over_stages(self, gradient: Tensor, holders: Sequence[int]) -> None:
        """Add up what several stages have of one parameter: a tied embedding and head."""
        group, own = self._grid.group("pipeline"), self._grid.place("pipeline")
        parts = {stage: torch.empty_like(gradient) for stage in holders if stage != own}
        ranks = {stage: dist.get_global_rank(group, stage) for stage in parts}
        sent = gradient.contiguous()
        calls = [dist.P2POp(dist.isend, sent, ranks[stage], group) for stage in parts]
        calls += [dist.P2POp(dist.irecv, part, ranks[each], group) for each, part in parts.items()]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        parts[own] = sent.clone()
        gradient.copy_(torch.stack([parts[stage] for stage in holders]).sum(0))


def local_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, divided as it is; zeros where there is none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def _holders(grid: Grid, names: Sequence[str]) -> list[list[int]]:
    """Return the stages that hold each parameter, in their order."""
    if grid.size("pipeline") == 1:
        return [[0] for _ in names]
    held: list[Sequence[str]] = [[]] * grid.size("pipeline")
    dist.all_gather_object(held, list(names), group=grid.group("pipeline"))
    return [[stage for stage, those in enumerate(held) if name in those] for name in names]


def _num_parts(grid: Grid, value: Tensor, num_holders: int) -> float:
    """Return into how many parts the mesh cuts a parameter; those held by several stages count as
    less."""
    stages = grid.size("pipeline") / num_holders
    if not isinstance(value, DTensor):
        return stages
    mesh = value.device_mesh
    cuts = [mesh.size(axis) for axis, how in enumerate(value.placements) if not how.is_replicate()]
    return math.prod(cuts) * stages
