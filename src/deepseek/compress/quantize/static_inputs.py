"""A stage that measures ahead how far the inputs of products reach, and fixes their int8 scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from deepseek.compress.calibration import Batch, Calibration, calibration_batches
from deepseek.compress.quantize.observers import Magnitudes, Observer
from deepseek.compress.quantize.targets import Model
from deepseek.compress.quantize.walk import watching
from deepseek.compress.stage import Stage
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.ops.quantized import QuantizedWeight, rotate
from deepseek.records import Measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticInputs(Stage):
    """Give the inputs of each product on a grid one int8 scale, from samples, for ever.

    Without this stage each token brings its own scale, which is nearer to the numbers and on a CPU
    costs next to nothing: static scales are for runtimes that have no others, and for chips without
    floating point. An embedding that is the head too keeps each token's own.
    """

    keeps_grid: ClassVar[bool] = True

    kind: Literal["static_inputs"] = "static_inputs"
    observer: Observer = "mse"
    """How far a scale reaches: see `Magnitudes.limit`."""
    most_error: float | None = None
    """Largest squared error of rounded inputs, over the sum of their squares, up to which they get
    a static scale; those of the other products stay dynamic. None for all static."""
    calibration: Calibration = dataclasses.field(default_factory=lambda: Calibration(samples=1000))

    def __post_init__(self) -> None:
        if self.most_error is not None and not 0 < self.most_error < math.inf:
            must = "above 0, or null"
            raise ConfigError(describe("most_error", "StaticInputs", must, self.most_error))


class InputRange(NamedTuple):
    """What was found of the inputs of a product."""

    scale: float
    """Of one level of int8; 0 where every input was 0."""
    error: float
    """The squared error of inputs that are rounded by it, over the sum of their squares."""


def apply(stage: StaticInputs, work: Work) -> Outcome:
    """Fix the scales of a model's inputs; return how many, and what rounding them costs.

    Raises:
        ConfigError: no weight lies on a grid, or there is no text to learn from.
    """
    weights = _products_on_grid(work)
    if not weights:
        raise ConfigError(
            describe("static_inputs", "the model", "behind a stage that quantizes it", "no grid")
        )
    batches = calibration_batches(work.model, stage.calibration)

    def goes_on(share: float) -> None:
        work.goes_on()
        work.report("watching inputs", share)

    ranges = input_ranges(work.model, weights, batches, stage.observer, goes_on)
    most = math.inf if stage.most_error is None else stage.most_error
    fixed = {name: each for name, each in ranges.items() if each.scale > 0 and each.error <= most}
    for name, weight in weights.items():
        scale = fixed[name].scale if name in fixed else None
        work.quantized[f"{name}.weight"] = dataclasses.replace(weight, input_scale=scale)
    work.report("inputs are static", 1.0)
    figures = (
        ("static_inputs", len(fixed)),
        ("dynamic_inputs", len(weights) - len(fixed)),
        ("input_error_largest", max((each.error for each in fixed.values()), default=0.0)),
    )
    return tuple(Measurement(name=name, value=float(value), unit="1") for name, value in figures)


def input_ranges(
    model: Model,
    weights: Mapping[str, QuantizedWeight],
    batches: Sequence[Batch],
    observer: Observer,
    goes_on: Callable[[float], None] = lambda share: None,
) -> dict[str, InputRange]:
    """Return the range of what each product reads, by the module's name.

    Args:
        model: run once over the batches.
        weights: of the products, by their modules' names; inputs of a rotated one are seen behind
            the rotation.
        batches: samples; what is padding is seen too.
        observer: how far a range reaches.
        goes_on: called before each batch with the share that is done; may raise.
    """
    seen = {name: Magnitudes() for name in weights}

    def see(name: str, given: tuple[Any, ...]) -> None:
        inputs = given[0].float()
        seen[name].see(rotate(inputs) if weights[name].is_rotated else inputs)

    modules = {name: model.get_submodule(name) for name in weights}
    with watching(modules, see), torch.no_grad():
        for place, (input_ids, mask) in enumerate(batches):
            goes_on(place / len(batches))
            model(input_ids, mask)
    limits = {name: each.limit(observer) for name, each in seen.items()}
    return {
        name: InputRange(float(np.float32(limit / 127)), seen[name].relative_error(limit))
        for name, limit in limits.items()
    }


def _products_on_grid(work: Work) -> dict[str, QuantizedWeight]:
    """Return the weights of linear layers that lie on a grid, by the layers' names; that of a head
    which is the embedding goes by the embedding's."""
    return {
        name: work.quantized[f"{name}.weight"]
        for name, module in work.model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in work.quantized
    }
