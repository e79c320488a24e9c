"""Groups of channels that are alike: what can be removed of a model, unit by unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compress.prune.channels import FIXED
from deepseek.compress.prune.trace import Tracer

Dimension = tuple[str, int]
"""A parameter's name, and one of its dimensions."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units of which any number can be removed: the channels of a feed-forward, the KV heads of a
    layer with all that reads them."""

    places: Mapping[Dimension, Tensor]
    """Int64 [units, places of a unit]: what of each dimension belongs to a unit, in order."""
    read: frozenset[Dimension]
    """Those that are inputs of a product: what is done with what the unit gives."""
    reaches_output: bool = False
    """Its size is one of the model's output."""

    @property
    def num_units(self) -> int:
        """Units that there are."""
        return len(next(iter(self.places.values())))

    def kept_places(self, dimension: Dimension, units: Tensor) -> Tensor:
        """Return what is left of a dimension where some units [n] are kept, in order."""
        return self.places[dimension][units].flatten().sort().values


def find_groups(model: nn.Module, run: Callable[[], Any]) -> list[Group]:
    """Return the groups of a model, from one run of it; units that cannot be removed are in none.

    Args:
        model: in eval mode; stays as it is.
        run: calls the model, and returns its output: a tensor, or a tuple of them and of None. A
            few tokens are enough; of a mixture of experts each layer must use one of them.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    tracer = Tracer(dict(named))
    with torch.no_grad(), tracer:
        output = run()
    shown = {
        int(label)
        for tensor in _tensors(output)
        for labels in tracer.dims(tensor)
        for label in (() if labels is None else labels)
        if label != FIXED
    }
    outward = {tracer.channels.owner(label) for label in shown}
    alike: dict[frozenset[tuple[Dimension, int]], list[dict[Dimension, list[int]]]] = {}
    for unit in tracer.channels.sets():
        kind = frozenset((dimension, len(places)) for dimension, places in unit.items())
        alike.setdefault(kind, []).append(unit)
    return [_group(units, tracer.read, outward) for units in alike.values()]


def _group(
    units: list[dict[Dimension, list[int]]], read: set[Dimension], outward: set[Dimension]
) -> Group:
    first = units[0]
    anchor = next(iter(first))
    units = sorted(units, key=lambda unit: unit[anchor])
    places = {dimension: torch.tensor([unit[dimension] for unit in units]) for dimension in first}
    return Group(places, frozenset(read & set(first)), bool(outward & set(first)))


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)
