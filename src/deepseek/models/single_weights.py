"""Weights by the names that files and programs have them under: those of experts one by one, which
a model keeps stacked."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from deepseek.models.layers import ExpertWeights


def single_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter once, by its name; of stacked experts each matrix
    (`…experts.3.down_proj.weight`), a view into the stack."""
    stacks = {
        name: module for name, module in model.named_modules() if isinstance(module, ExpertWeights)
    }
    for name, parameter in model.named_parameters():
        prefix, _, _ = name.rpartition(".")
        if prefix not in stacks:
            yield name, parameter.detach()
        elif name.endswith("down_proj"):  # the last of a stack
            for expert in range(len(parameter)):
                for part in ("gate", "up", "down"):
                    single = f"{prefix}.{expert}.{part}_proj.weight"
                    yield single, weight_of(model, single)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return a parameter by a name of `single_weights`, detached, in place.

    Raises:
        AttributeError: the model has none of this name.
    """
    prefix, _, rest = name.partition(".experts.")
    if rest.count(".") != 2:
        return model.get_parameter(name).detach()
    index, part, _ = rest.split(".")
    if part == "down_proj":
        return model.get_parameter(f"{prefix}.experts.down_proj").detach()[int(index)]
    both = model.get_parameter(f"{prefix}.experts.gate_up_proj").detach()[int(index)]
    return both.chunk(2)[part == "up_proj"]
