"""Experts divided over processes: along `expert` tokens travel to them, along `tensor` each process
computes its share of what all of them hold.

Works on any module that is called with (tokens [N, hidden], chosen int64 [N, k], weights [N, k]),
returns [N, hidden], and whose parameters have the experts as their first dimension. Its own forward
pass goes on running, over the experts that are here; it may read nothing but those parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from deepseek.parallel.mesh import Grid

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def split_experts(module: nn.Module, grid: Grid) -> None:
    """Divide a module of experts in place; it is called as before.

    Args:
        module: as this file says.
        grid: the mesh; axes of one process change nothing.
    """
    axes = [axis for axis in ("expert", "tensor") if grid.size(axis) > 1]
    if not axes:
        return
    mesh = grid.along(*axes)
    for name, weight in list(module.named_parameters(recurse=False)):
        split = distribute_tensor(weight, mesh, [Shard(0)] * len(axes), src_data_rank=None)
        module.register_parameter(name, nn.Parameter(split, weight.requires_grad))
    run: Experts = _Local(module)
    if grid.size("tensor") > 1:
        run = _Shared(run, grid.along("tensor"), module)
    if grid.size("expert") > 1:
        run = _Travelling(run, grid.group("expert"), module)
    # the hooks of the module, and whoever wraps it later, see the same module
    vars(module)["forward"] = run


def _num_here(module: nn.Module) -> int:
    """Return the experts whose weights this process holds."""
    weight = next(module.parameters())
    assert isinstance(weight, DTensor)
    return weight.shape[0] // weight.device_mesh.size()


class _Local:
    """The module's own pass over the experts that are here, counted from 0."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._own = module, type(module).forward

    def __call__(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        local = {
            name: value.to_local() if isinstance(value, DTensor) else value
            for name, value in self._module.named_parameters()
        }
        if len(tokens):
            return self._own(SimpleNamespace(**local), tokens, chosen, weights)
        # Nobody came. The others wait for this process in the backward pass all the same, so what
        # is returned must hang on all that it would have been computed from.
        touched = [value.flatten()[:0].sum() for value in local.values()]
        return tokens * weights.sum(1, keepdim=True) + torch.stack(touched).sum().to(tokens.dtype)


class _Shared:
    """Tokens are on every process, and each computes those of its own experts."""

    def __init__(self, run: Experts, mesh: DeviceMesh, module: nn.Module) -> None:
        self._run, self._mesh, self._module = run, mesh, module

    def __call__(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, weights = self._entered(tokens), self._entered(weights)
        count = _num_here(self._module)
        here = torch.div(chosen, count, rounding_mode="floor") == self._mesh.get_local_rank()
        rows = here.nonzero()[:, 0]
        own = self._run(tokens[rows], (chosen[here] % count)[:, None], weights[here][:, None])
        out = tokens.new_zeros(tokens.shape).index_add(0, rows, own.to(tokens.dtype))
        summed = DTensor.from_local(out, self._mesh, [Partial()], run_check=False)
        return summed.redistribute(placements=[Replicate()]).to_local()

    def _entered(self, states: Tensor) -> Tensor:
        """Return the same; its gradient is added up over the processes."""
        whole = DTensor.from_local(states, self._mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])


class _Travelling:
    """Each process has tokens of its own: they go to where their experts are, and come back."""

    def __init__(self, run: Experts, group: dist.ProcessGroup, module: nn.Module) -> None:
        self._run, self._group, self._module = run, group, module

    def __call__(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        size, slots = self._group.size(), chosen.flatten()
        held = next(self._module.parameters()).shape[0] // size
        order = slots.argsort(stable=True)
        rows = torch.div(order, chosen.shape[1], rounding_mode="floor")
        going = torch.div(slots, held, rounding_mode="floor").bincount(minlength=size)
        coming = torch.empty_like(going)
        dist.all_to_all_single(coming, going, group=self._group)
        there, back = going.tolist(), coming.tolist()
        wanted = _exchange(slots[order] % held, back, there, self._group)
        received = _Exchange.apply(tokens[rows], back, there, self._group)
        ones = received.new_ones(len(received), 1)
        out = self._run(received, wanted[:, None], ones).to(tokens.dtype)
        returned = _Exchange.apply(out, there, back, self._group)
        returned = returned * weights.flatten()[order][:, None]
        return tokens.new_zeros(tokens.shape).index_add(0, rows, returned.to(tokens.dtype))


class _Exchange(torch.autograd.Function):
    """Rows that the others sent: `going[p]` of mine go to process p. Gradients travel back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, coming: list[int], going: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = going, coming, group
        return _exchange(rows, coming, going, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], *ctx.way), None, None, None


def _exchange(
    rows: Tensor, coming: list[int], going: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = rows.new_empty(sum(coming), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), coming, going, group=group)
    return out
