"""Routed experts while their weights are put on grids: one by one, out of stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.models.layers import ExpertWeights
from deepseek.models.single_weights import weight_of


def stacks_of(model: nn.Module) -> dict[str, ExpertWeights]:
    """Return the stacks of a model or a layer by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, ExpertWeights)
    }


def inputs_of(
    experts: ExpertWeights, tokens: Tensor, chosen: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield what goes into the products of each expert that a token has chosen: `3.gate_proj` and
    the rows [n, hidden], which up sees too, then `3.down_proj` and the rows [n, width].

    Args:
        experts: with the weights as they are.
        tokens: [N, hidden].
        chosen: int64 [N, k].
    """
    for expert in chosen.unique().tolist():
        rows = tokens[(chosen == expert).any(-1)]
        gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        yield f"{expert}.gate_proj", rows
        yield f"{expert}.down_proj", F.silu(gate) * up


def stacked(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values of weights by the names of a module's parameters: those of experts as stacks,
    with the module's own in the place of any that is not given.

    Args:
        module: that has the weights.
        values: by the names of `single_weights` within the module, of one dtype.
    """
    found = dict(values)
    for prefix in stacks_of(module):
        singles = {name for name in found if name.startswith(f"{prefix}.")}
        if not singles:
            continue
        parts = {name: found.pop(name) for name in singles}
        dtype = next(iter(parts.values())).dtype
        count = len(module.get_parameter(f"{prefix}.down_proj"))
        gate, up, down = (
            [
                parts[name] if name in parts else weight_of(module, name).to(dtype)
                for name in (f"{prefix}.{expert}.{part}_proj.weight" for expert in range(count))
            ]
            for part in ("gate", "up", "down")
        )
        found[f"{prefix}.gate_up_proj"] = torch.cat((torch.stack(gate), torch.stack(up)), 1)
        found[f"{prefix}.down_proj"] = torch.stack(down)
    return found
