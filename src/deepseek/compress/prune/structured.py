"""The stage that makes a model smaller by leaving whole units out: layers, heads, channels, width,
experts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deepseek.compress.calibration import Calibration
from deepseek.compress.prune.cutter import Cutter
from deepseek.compress.prune.importance import Importance
from deepseek.compress.prune.latency import (
    LatencyModel,
    Workload,
    fit_latency,
    measure,
    why_no_clock,
)
from deepseek.compress.prune.search import (
    Choice,
    measured_curve,
    parameters_cost,
    search,
    seconds_cost,
    sizes_of,
)
from deepseek.compress.prune.shape import PARTS, Part, Shape, shape_of
from deepseek.compress.stage import Stage
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder, EncoderConfig
from deepseek.records import Measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Stage):
    """Leave out the units that the model would miss least.

    Every layer keeps the same number of them, because a config has one size for all; which they are
    is each layer's own. What is lost is not trained back here.
    """

    kind: Literal["prune"] = "prune"
    share: float = 0.3
    """Of `target`, to be saved."""
    target: Literal["latency", "parameters"] = "parameters"
    """What is saved: all parameters, embeddings included; or the seconds of `workload` on this
    machine, as the latency model predicts them."""
    parts: tuple[Part, ...] = PARTS
    """What may be cut; parts that the model has not are no matter."""
    to: Shape | None = None
    """The sizes to come to; `share`, `target` and `parts` do not count then."""
    importance: Importance = "activation"
    """Which units are missed least; layers always go by how little they change their input."""
    multiple: int = 64
    """Of widths and channels that are cut: what the kernels take at once."""
    calibration: Calibration = dataclasses.field(
        default_factory=lambda: Calibration(samples=16, length=256)
    )
    workload: Workload = dataclasses.field(default_factory=Workload)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(describe("share", "Prune", "between 0 and 1", self.share))
        if self.multiple < 1:
            raise ConfigError(describe("multiple", "Prune", "at least 1", self.multiple))
        if not self.parts:
            raise ConfigError(describe("parts", "Prune", f"some of {', '.join(PARTS)}", self.parts))


def apply(stage: Prune, work: Work) -> Outcome:
    """Put a smaller model in the place of the work's.

    Returns:
        parameters, sizes and losses before and after, the share of importance that was kept, and
        the seconds that were predicted and measured, where the model has a clock.

    Raises:
        ConfigError: the shape cannot be come to, or the model has no clock and latency is the
            target.
        FormatError: the model's family cannot express the shape.
    """
    whole, latency = work.model, None
    if stage.target == "latency" or why_no_clock(whole.config) is None:
        work.report("timing models of other sizes", None)
        latency = fit_latency(whole.config, stage.workload)
    cutter = Cutter(whole, stage.importance, stage.calibration, work)
    choice = None if stage.to is not None else _search(stage, work, cutter, latency)
    shape = stage.to if choice is None else choice.shape
    done = cutter.cut(shape or Shape())
    work.model = done.model
    conditions = {
        "importance": stage.importance,
        "target": stage.target,
        **stage.calibration.to_dict(),
    }
    found = [
        *_counted(whole, done.model),
        Measurement(name="importance_kept", value=done.importance_kept, unit="1"),
        Measurement(name="probe_loss_before", value=cutter.whole_loss, unit=cutter.unit),
        Measurement(name="probe_loss_after", value=cutter.loss(done), unit=cutter.unit),
    ]
    if choice is not None:
        value = cutter.whole_loss + choice.loss
        found.append(Measurement(name="probe_loss_predicted", value=value, unit=cutter.unit))
    found = [dataclasses.replace(item, conditions=conditions) for item in found]
    return tuple(found + ([] if latency is None else _timed(whole, done.model, latency)))


def _search(stage: Prune, work: Work, cutter: Cutter, latency: LatencyModel | None) -> Choice:
    config = cutter.model.config
    have = shape_of(config).sizes
    sizes: dict[Part, list[int]] = {
        part: sizes_of(config, part, stage.multiple)
        for part in stage.parts
        if part in have and (part == "layers" or cutter.anatomy.of(part))
    }
    if isinstance(config, EncoderConfig):
        sizes.pop("heads", None)  # they follow the width
    curves = {}
    for place, (part, each) in enumerate(sizes.items()):
        work.report(f"losses of fewer {part}", place / len(sizes))
        curves[part] = measured_curve(config, part, each, cutter.loss_of, cutter.whole_loss)
    if stage.target == "latency" and latency is not None:
        cost = seconds_cost(config, latency)
    else:
        cost = parameters_cost(cutter.model, cutter.anatomy)
    return search(config, curves, sizes, cost, stage.share)


def _counted(before: Decoder | Encoder, after: Decoder | Encoder) -> list[Measurement]:
    counts = [sum(each.numel() for each in model.parameters()) for model in (before, after)]
    found = [
        Measurement(name="parameters_before", value=counts[0], unit="1"),
        Measurement(name="parameters_after", value=counts[1], unit="1"),
        Measurement(name="parameters_kept", value=counts[1] / counts[0], unit="1"),
    ]
    whole, left = shape_of(before.config), shape_of(after.config)
    for part, size in left.sizes.items():
        of = {"of": whole.size(part)}
        found.append(Measurement(name=f"{part}_after", value=size, unit="1", conditions=of))
    return found


def _timed(
    before: Decoder | Encoder, after: Decoder | Encoder, latency: LatencyModel
) -> list[Measurement]:
    """Return predicted and measured seconds: a config's, its weights left to chance."""
    workload = latency.workload
    conditions = {**workload.to_dict(), "repeats": "least of 3"}
    predicted = [latency.seconds(model.config) for model in (before, after)]
    measured = [measure(model.config, workload).seconds(workload) for model in (before, after)]
    found = {
        "predicted_s_before": (predicted[0], "s"),
        "predicted_s_after": (predicted[1], "s"),
        "measured_s_before": (measured[0], "s"),
        "measured_s_after": (measured[1], "s"),
        "measured_speedup": (measured[0] / measured[1], "1"),
        "latency_fit_error": (latency.error, "1"),
    }
    return [
        Measurement(name=name, value=value, unit=unit, conditions=conditions)
        for name, (value, unit) in found.items()
    ]
