"""The stage that sets weights to zero one by one, in no shape or two of every four."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from deepseek.compress.calibration import Calibration, calibration_batches
from deepseek.compress.prune.cut import layers_of
from deepseek.compress.prune.importance import input_squares
from deepseek.compress.stage import Stage
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.models.layers import ExpertWeights
from deepseek.records import Measurement

NO_SPEED = (
    "zeros are stored and multiplied like any other number: no kernel here skips them, and the "
    "model is neither faster nor smaller on the disk"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsify(Stage):
    """Set the least important weights of the layers' products to zero; embeddings, head, norms,
    biases and routers stay. It brings no speed here: it is for what trains or runs on from it
    elsewhere.
    """

    kind: Literal["sparsify"] = "sparsify"
    share: float = 0.5
    """Of a row's weights, to be zero; with `2:4` it is one half."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """`2:4`: two of every four neighbours in a row, as some accelerators take them."""
    importance: Literal["magnitude", "wanda"] = "wanda"
    """wanda: a weight's magnitude times the root mean square of its input."""
    calibration: Calibration = dataclasses.field(
        default_factory=lambda: Calibration(samples=32, length=256)
    )

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(describe("share", "Sparsify", "between 0 and 1", self.share))
        if self.pattern == "2:4" and self.share != 0.5:
            raise ConfigError(describe("share", "Sparsify", "0.5 with 2:4", self.share))


def apply(stage: Sparsify, work: Work) -> Outcome:
    """Set weights of the work's model to zero, in place.

    Source: Wanda (2306.11695), section 3, its comparison by output row. Deviation: all layers are
    scored by the inputs of the dense model, in one pass, and not each behind those that were
    sparsified before it.

    Raises:
        ConfigError: `2:4` and a width that is no multiple of four, or wanda and experts, whose
            inputs are not seen.
    """
    layers = layers_of(work.model)
    weights = {
        name: module.weight
        for name, module in _named(work.model, layers)
        if isinstance(module, nn.Linear)
    }
    stacks = [
        module for _, module in _named(work.model, layers) if isinstance(module, ExpertWeights)
    ]
    squares: dict[str, Tensor] = {}
    if stage.importance == "wanda":
        if stacks:
            must = "magnitude where there are experts, whose inputs are not seen"
            raise ConfigError(describe("importance", "Sparsify", must, "wanda"))
        work.report("inputs of the products", None)
        batches = calibration_batches(work.model, stage.calibration)
        squares = input_squares(work.model, batches, work.goes_on)
    every = [(weight, squares.get(f"{name}.weight")) for name, weight in weights.items()]
    every += [(each, None) for stack in stacks for each in stack.parameters()]
    zeros = total = 0
    for weight, square in every:
        scores = weight.detach().abs()
        if square is not None:
            scores = scores * square.sqrt()
        keeps = (
            keeps_two_of_four(scores)
            if stage.pattern == "2:4"
            else keeps_share(scores, stage.share)
        )
        weight.data.mul_(keeps)
        zeros, total = zeros + int((weight.data == 0).sum()), total + weight.numel()
    everything = sum(each.numel() for each in work.model.parameters())
    conditions = {"pattern": stage.pattern, "importance": stage.importance, "speed": NO_SPEED}
    found = {
        "sparsity": zeros / total,
        "sparsity_of_all_parameters": zeros / everything,
        "speedup_expected": 1.0,
    }
    return tuple(
        Measurement(name=name, value=value, unit="1", conditions=conditions)
        for name, value in found.items()
    )


def _named(model: nn.Module, layers: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """Return the modules of the layers, by the names that the model has for them."""
    inside = {id(module) for module in layers.modules()}
    return [(name, module) for name, module in model.named_modules() if id(module) in inside]


def keeps_share(scores: Tensor, share: float) -> Tensor:
    """Return which weights are kept: bool, False for the least `share` of every row, rounded down.

    Args:
        scores: [..., in].
        share: between 0 and 1.
    """
    keeps = torch.ones_like(scores, dtype=torch.bool)
    count = int(scores.shape[-1] * share)
    least = scores.topk(count, dim=-1, largest=False).indices
    return keeps.scatter_(-1, least, False)


def keeps_two_of_four(scores: Tensor) -> Tensor:
    """Return which weights are kept: bool, the two with the highest scores of every four.

    Args:
        scores: [..., in], `in` a multiple of four.

    Raises:
        ConfigError: it is not.
    """
    if scores.shape[-1] % 4:
        must = "unstructured for a width that is no multiple of four"
        raise ConfigError(describe("pattern", "Sparsify", must, scores.shape[-1]))
    fours = scores.unflatten(-1, (-1, 4))
    keeps = torch.zeros_like(fours, dtype=torch.bool)
    return keeps.scatter_(-1, fours.topk(2, dim=-1).indices, True).flatten(-2)
