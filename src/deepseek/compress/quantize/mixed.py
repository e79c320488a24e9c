"""Which units have four bits and which eight: the least loss that fits into a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek.compress.calibration import Batch
from deepseek.compress.quantize.grid import Grid, round_weight
from deepseek.compress.quantize.targets import Model, Unit, layers_of
from deepseek.compress.quantize.walk import Precision, computing, first_flows
from deepseek.config import Config
from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.models import Encoder
from deepseek.models.single_weights import weight_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedBits(Config):
    """Bits by measured sensitivity under a budget; in place of one number of bits for all layers.

    Each unit (what is one instruction of the engine) is rounded alone to 4 and to 8 bits; what the
    model's predictions lose by it is taken to add up.
    """

    budget_bytes: int
    """Of all weights: codes, scales and zero points of what lies on a grid, four bytes a number of
    what does not."""
    samples: int = 4
    """Of the calibration, by which a unit's loss is measured."""

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "MixedBits", "at least 1", getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to store a unit."""

    num_bytes: int
    loss: float


def choose(options: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Return the option of each unit whose losses add up to least within a budget, exactly.

    It keeps, unit by unit, every sum of bytes that no smaller one beats in loss.

    Args:
        options: of each unit, at least one.
        budget: the most bytes of all together.

    Raises:
        CapacityError: the smallest options are larger.
    """
    least = sum(min(each.num_bytes for each in unit) for unit in options)
    if least > budget:
        must = f"at least {least} bytes, what the smallest choices take"
        raise CapacityError(describe("budget", "MixedBits", must, budget))
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for unit in options:
        new_sizes = np.concatenate([sizes + each.num_bytes for each in unit])
        new_losses = np.concatenate([losses + each.loss for each in unit])
        before = np.tile(np.arange(len(sizes)), len(unit))
        chosen = np.repeat(np.arange(len(unit)), len(sizes))
        order = np.lexsort((new_losses, new_sizes))
        order = order[new_sizes[order] <= budget]
        best = np.minimum.accumulate(new_losses[order])
        is_kept = np.concatenate(([True], best[1:] < best[:-1]))
        order = order[is_kept]
        sizes, losses = new_sizes[order], new_losses[order]
        trail.append((before[order], chosen[order]))
    place, picked = int(losses.argmin()), []
    for before, chosen in reversed(trail):
        picked.append(int(chosen[place]))
        place = int(before[place])
    return picked[::-1]


def sensitivities(
    model: Model,
    units: Sequence[Unit],
    grids: Mapping[int, Grid],
    batches: Sequence[Batch],
    precision: Precision,
    goes_on: Callable[[float], None] = lambda share: None,
) -> list[dict[int, float]]:
    """Return what a model's output loses when one unit alone is rounded, by its bits.

    The loss is the mean KL divergence of a decoder's predictions from those of the model as it is,
    in nats a token, or the relative squared error of an encoder's states. The layers before the
    unit's own are not run again.

    Args:
        model: left as it is.
        units: those that lie in layers.
        grids: by bits.
        batches: samples.
        precision: of products.
        goes_on: called before each unit with the share that is done; may raise.
    """
    _, layers = layers_of(model)
    flows, found = first_flows(model, batches), []
    reached = 0
    with torch.no_grad(), computing(precision):
        wanted = [_rest(model, flow.states, flow.about, 0) for flow in flows]
        for place, unit in enumerate(units):
            goes_on(place / len(units))
            assert unit.layer is not None
            while reached < unit.layer:
                flows = [f._replace(states=layers[reached](f.states, f.about)) for f in flows]
                reached += 1
            found.append(
                {bits: _loss_of(model, unit, grid, flows, wanted) for bits, grid in grids.items()}
            )
    return found


def _loss_of(
    model: Model, unit: Unit, grid: Grid, flows: Sequence[Any], wanted: Sequence[Tensor]
) -> float:
    weights = [weight_of(model, name) for name in unit.weights]
    kept = [weight.clone() for weight in weights]
    assert unit.layer is not None
    try:
        for weight in weights:
            weight.copy_(round_weight(weight, grid).values())
        losses = [
            _distance(
                flow.tokens(_rest(model, flow.states, flow.about, unit.layer)),
                flow.tokens(expected),
                is_logits=not isinstance(model, Encoder),
            )
            for flow, expected in zip(flows, wanted, strict=True)
        ]
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.copy_(values)
    return sum(losses) / len(losses)


def _rest(model: Model, states: Tensor, about: Any, first: int) -> Tensor:
    """Return a decoder's logits or an encoder's states behind the layers from `first` on."""
    for layer in layers_of(model)[1][first:]:
        states = layer(states, about)
    return states if isinstance(model, Encoder) else model.lm_head(model.model.norm(states))


def _distance(found: Tensor, expected: Tensor, *, is_logits: bool) -> float:
    if not is_logits:
        return float((found - expected).square().sum() / expected.square().sum())
    ours, theirs = found.float().log_softmax(-1), expected.float().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())
