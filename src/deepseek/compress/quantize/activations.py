"""What products read, in eight bits: static ranges from samples, or each token's own.

The engine rounds inputs by each row and group at run time; static ranges are for runtimes that want
them, and are tried here on the model's modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepseek.compress.calibration import Batch
from deepseek.compress.quantize.observers import Magnitudes, Observer
from deepseek.compress.quantize.targets import Model
from deepseek.compress.quantize.walk import watching

Granularity = Literal["tensor", "channel"]


def products(model: Model) -> dict[str, nn.Linear]:
    """Return every product of a model by name."""
    found = dict(model.named_modules())
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


def input_scales(
    model: Model,
    batches: Sequence[Batch],
    observer: Observer = "mse",
    granularity: Granularity = "tensor",
) -> dict[str, Tensor]:
    """Return the static symmetric int8 scale of what each product reads, by the module's name.

    Args:
        model: run once over the batches.
        batches: samples; their padding is seen too.
        observer: how far the range reaches, see `Magnitudes.limits`.
        granularity: one scale [1], or one for each input channel [K]; the latter cannot be taken
            out of an integer product and must be folded into the weights.
    """
    seen: dict[str, Magnitudes] = {}

    def see(name: str, given: tuple[Any, ...]) -> None:
        rows = given[0].flatten(0, -2)
        values = rows.reshape(1, -1) if granularity == "tensor" else rows.T
        if name not in seen:
            seen[name] = Magnitudes(len(values))
        seen[name].see(values)

    with watching(products(model), see), torch.no_grad():
        for input_ids, mask in batches:
            model(input_ids, mask)
    return {name: each.limits(observer) / 127 for name, each in seen.items()}


@contextlib.contextmanager
def rounded_inputs(model: Model, scales: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Run a model's products on inputs as int8 holds them.

    Args:
        model: whose modules are watched meanwhile.
        scales: static ones of `input_scales`; None for each token's own.
    """

    def rounded(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs = given[0]
            own = inputs.abs().amax(-1, keepdim=True) / 127 if scales is None else scales[name]
            own = own.clamp(min=1e-30)
            return ((inputs / own).round().clamp(-127, 127) * own, *given[1:])

        return hook

    names = products(model) if scales is None else scales
    handles = [model.get_submodule(each).register_forward_pre_hook(rounded(each)) for each in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
