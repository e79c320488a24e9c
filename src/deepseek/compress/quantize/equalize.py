"""A stage that takes outliers out of what products read, and puts them into their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek.compress.calibration import Batch, Calibration, calibration_batches
from deepseek.compress.quantize.folds import Fold, apply_fold, folds
from deepseek.compress.quantize.targets import Model
from deepseek.compress.quantize.walk import watching
from deepseek.compress.stage import Stage
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.records import Measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equalize(Stage):
    """Divide each channel by its range in the inputs, and multiply the weights that read it, before
    both are rounded. The model computes what it did.

    Source: Xiao et al., "SmoothQuant" (2211.10438), section 4, equation 4; deviation: also between
    values and output, and between up and down products.
    """

    kind: Literal["equalize"] = "equalize"
    strength: float = 0.5
    """How much of the range moves into the weights; the source's alpha."""
    calibration: Calibration = dataclasses.field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ConfigError(describe("strength", "Equalize", "from 0 to 1", self.strength))


def apply(stage: Equalize, work: Work) -> Outcome:
    """Equalize the model of some work in place; return how far its inputs' channels were apart
    before and after: the largest range of a channel over the mean one, mean over the places."""
    batches = calibration_batches(work.model, stage.calibration)
    before, after = equalize(work.model, batches, stage.strength)
    work.report("equalized", 1.0)
    return tuple(
        Measurement(name=f"input_range_spread_{when}", value=value, unit="1")
        for when, value in (("before", before), ("after", after))
    )


def equalize(model: Model, batches: Sequence[Batch], strength: float) -> tuple[float, float]:
    """Move factors between a model's neighbours in place.

    Args:
        model: in float32.
        batches: what shows the inputs.
        strength: as in `Equalize`.

    Returns:
        the largest range of an input channel over the mean one, as a mean over the places, before
        and after.
    """
    places = folds(model)
    ranges = input_ranges(model, batches, [place.sees for place in places])
    before, after = [], []
    for place in places:
        inputs = ranges[place.sees]
        factor = _factor(model, place, inputs, strength)
        apply_fold(model, place, factor)
        before.append(float(inputs.max() / inputs.mean()))
        inputs = inputs / place.spread(factor)
        after.append(float(inputs.max() / inputs.mean()))
    return sum(before) / len(before), sum(after) / len(after)


def input_ranges(model: Model, batches: Sequence[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the largest magnitude of each input channel of some modules [K]; padding counts."""
    found: dict[str, Tensor] = {}

    def see(name: str, given: tuple[Any, ...]) -> None:
        largest = given[0].float().abs().flatten(0, -2).amax(0)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    modules = {name: model.get_submodule(name) for name in names}
    with watching(modules, see), torch.no_grad():
        for input_ids, mask in batches:
            model(input_ids, mask)
    return found


def _factor(model: Model, place: Fold, inputs: Tensor, strength: float) -> Tensor:
    """Return what each channel of the producers is divided by."""
    columns = [model.get_parameter(name).data for name in place.consumers]
    weights = torch.stack([each.abs().flatten(0, -2).amax(0) for each in columns]).amax(0)
    moved = place.gathered(inputs), place.gathered(weights)
    inputs, weights = (each.clamp(min=1e-5) for each in moved)
    return (inputs**strength / weights ** (1 - strength)).clamp(min=1e-4, max=1e4)
