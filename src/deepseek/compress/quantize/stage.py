"""The stage that puts a model's weights on a grid."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from deepseek.compress.calibration import Batch, Calibration, calibration_batches
from deepseek.compress.quantize.awq import scale_salient
from deepseek.compress.quantize.end_to_end import EndToEnd, learn_scales
from deepseek.compress.quantize.folds import folds
from deepseek.compress.quantize.gptq import Compensated, gptq
from deepseek.compress.quantize.grid import Grid, Scales, round_weight
from deepseek.compress.quantize.kept import KeptLayers
from deepseek.compress.quantize.learned import Learned, Rounding, learn_rounding
from deepseek.compress.quantize.mixed import Choice, MixedBits, choose, sensitivities
from deepseek.compress.quantize.targets import Model, Unit, layers_of, units
from deepseek.compress.quantize.walk import (
    Flow,
    Precision,
    first_flows,
    grams,
    relative_error,
    through,
)
from deepseek.compress.stage import Stage
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.models.single_weights import single_weights, weight_of
from deepseek.ops.quantized import QuantizedWeight
from deepseek.ops.scheme import ROTATED
from deepseek.records import Measurement

Bits = Literal[4, 8]
Group = Literal[32, 64, 128]
Method = Literal["round", "awq", "gptq", "learned"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Stage):
    """Put every product and embedding of a model on a grid of integers."""

    puts_on_grid: ClassVar[bool] = True

    kind: Literal["quantize"] = "quantize"
    bits: Bits = 4
    """Of the products in the layers."""
    group: Group | None = 32
    """Their channels of one scale; None for a whole row. Every width must be a multiple of it."""
    symmetric: bool | None = None
    """The middle code stands for 0; None for 8 bits alone."""
    head_bits: Bits = 8
    """Of embeddings, head and pooler."""
    head_group: Group | None = None
    method: Method = "learned"
    """`round` to the nearest code of a searched range needs no data; `awq` makes important channels
    larger first; `gptq` makes up for each column's error in the next ones; `learned` goes on from
    there by what the layers give, and clings most to the text it sees: let that be mixed."""
    rotate: bool = False
    """Rotate every 64 channels of inputs and of weights of 8 bits, where a width is a multiple of
    64: outliers spread, and rounding costs less. The engine reads it; transformers 5 reads the file
    without it, and GPTQ's layout has no place for it. With `round` and `gptq`, and for a head of 8
    bits."""
    ignore: tuple[str, ...] = ()
    """Patterns (`*`, `?`) of names of weights that stay as they are."""
    mixed: MixedBits | None = None
    """Choose 4 or 8 bits for each unit of the layers; `bits` counts no more."""
    damping: float = 0.01
    """Of `gptq` and `learned`: share of the inputs' mean square that is added to all."""
    by_size: bool = True
    """Of `gptq` and `learned`: columns of large inputs are rounded first."""
    learned: Learned = dataclasses.field(default_factory=Learned)
    end_to_end: EndToEnd | None = None
    """A last part of `learned`: all scales together, by what the whole model says."""
    precision: Precision = "bfloat16"
    """Of products while measuring and learning; what is rounded and stored is float32."""
    calibration: Calibration = dataclasses.field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            must = "above 0 and at most 1"
            raise ConfigError(describe("damping", "Quantize", must, self.damping))
        if not self.rotate:
            return
        if (self.bits == 8 or self.mixed) and self.method not in ("round", "gptq"):
            must = "round or gptq where layers of 8 bits are rotated"
            raise ConfigError(describe("method", "Quantize", must, self.method))
        for name, is_rotated, group in (
            ("group", self.bits == 8 or self.mixed, self.group),
            ("head_group", self.head_bits == 8, self.head_group),
        ):
            if is_rotated and group is not None and group % ROTATED:
                must = f"a multiple of {ROTATED}, or null, where it is rotated"
                raise ConfigError(describe(name, "Quantize", must, group))

    @classmethod
    def usual(cls, bits: int, **given: Any) -> Quantize:
        """Return the stage for so many bits with what is usual where nothing is given: 8 bits by
        rows, rounded, rotated where that can be; 4 bits in groups of 32, learned.

        Args:
            bits: of the layers' products.
            **given: other fields.

        Raises:
            ConfigError: a field is none that can be.
        """
        if bits == 4:
            return cls.from_dict({"bits": 4, **given})
        asked = {"method": "round", "group": None, **given}
        groups = asked["group"], asked.get("head_group")
        is_wide = all(not group or group % ROTATED == 0 for group in groups)
        can_rotate = asked["method"] in ("round", "gptq") and is_wide
        return cls.from_dict({"bits": bits, "rotate": can_rotate, **asked})

    def grid(self, bits: int) -> Grid:
        """Return the grid of the layers' products in so many bits."""
        return self._grid(bits, self.group)

    @property
    def head_grid(self) -> Grid:
        """The grid of embeddings, head and pooler."""
        return self._grid(self.head_bits, self.head_group)

    def _grid(self, bits: int, group: int | None) -> Grid:
        symmetric = bits == 8 if self.symmetric is None else self.symmetric
        return Grid(bits, group, symmetric, self.rotate and bits == 8)


def apply(stage: Quantize, work: Work) -> Outcome:
    """Put the weights of some work on their grids; return what that took and cost.

    Raises:
        ConfigError: no tokenizer or too little text for the calibration, a group that does not
            divide a width, or nothing to do.
        CapacityError: the budget of mixed bits is too small.
    """
    batches = calibration_batches(work.model, stage.calibration, stage.learned.batch)
    return quantize(stage, work, batches)


def quantize(stage: Quantize, work: Work, batches: Sequence[Batch]) -> Outcome:
    """Do what `apply` does by samples that are given."""
    model = work.model
    found = units(model, stage.ignore)
    grids = _grids(stage, work, found, batches)
    for name, grid in grids.items():
        grid.width_of(weight_of(model, name).shape[-1])
    learns_scales = stage.method == "learned" and stage.end_to_end is not None
    teacher = copy.deepcopy(model) if learns_scales else None
    run = _Run(stage, work, grids, found)
    errors = run.layers(batches)
    run.behind(batches)
    if teacher is not None and stage.end_to_end is not None:
        prefix = layers_of(model)[0]
        within = {name: work.quantized[name] for name in grids if name.startswith(prefix)}

        def goes_on(share: float) -> None:
            work.goes_on()
            work.report("learning the scales together", share)

        settings = stage.end_to_end
        work.set_quantized(
            learn_scales(
                model, teacher, within, batches, settings, stage.precision, work.seed, goes_on
            )
        )
        errors = [*errors[:-1], _last_error(stage, model, teacher, batches)]
    work.report("quantized", 1.0)
    return _outcome(stage, work, grids, errors)


def _grids(
    stage: Quantize, work: Work, found: Sequence[Unit], batches: Sequence[Batch]
) -> dict[str, Grid]:
    """Return the grid of each weight by name."""
    grids = {
        name: stage.head_grid if unit.layer is None else stage.grid(stage.bits)
        for unit in found
        for name in unit.weights
    }
    if stage.mixed is None:
        return grids
    inner = [unit for unit in found if unit.layer is not None]
    choices = {bits: stage.grid(bits) for bits in (4, 8)}

    def goes_on(share: float) -> None:
        work.goes_on()
        work.report("measuring what each unit loses", share)

    few = batches[: max(1, stage.mixed.samples // len(batches[0].input_ids))]
    losses = sensitivities(work.model, inner, choices, few, stage.precision, goes_on)
    options = [
        [
            Choice(sum(_bytes(work.model, name, choices[bits]) for name in unit.weights), loss)
            for bits, loss in by_bits.items()
        ]
        for unit, by_bits in zip(inner, losses, strict=True)
    ]
    layers = {name for unit in inner for name in unit.weights}
    rest = sum(
        _bytes(work.model, name, grids[name]) if name in grids else 4 * parameter.numel()
        for name, parameter in single_weights(work.model)
        if name not in layers
    )
    *picked, _ = choose([*options, [Choice(rest, 0.0)]], stage.mixed.budget_bytes)
    for unit, place in zip(inner, picked, strict=True):
        grids |= dict.fromkeys(unit.weights, list(choices.values())[place])
    return grids


def _bytes(model: Model, name: str, grid: Grid) -> int:
    """Return what a weight takes on a grid."""
    rows, channels = weight_of(model, name).shape
    scales = rows * (channels // grid.width_of(channels))
    zeros = 0 if grid.symmetric else scales * grid.bits // 8
    return rows * channels * grid.bits // 8 + 2 * scales + zeros


@dataclasses.dataclass
class _Run:
    """One pass through a model, layer by layer."""

    stage: Quantize
    work: Work
    grids: dict[str, Grid]
    found: Sequence[Unit]

    def layers(self, batches: Sequence[Batch]) -> list[float]:
        """Put embeddings and layers on their grids; return the relative squared error of each
        layer's output, with what came before it."""
        work, model = self.work, self.work.model
        prefix, layers = layers_of(model)
        expected = first_flows(model, batches)
        head = [name for unit in self.found if unit.layer is None for name in unit.weights]
        embeddings = [name for name in head if _is_embedding(model, name)]
        work.set_quantized({name: self._rounded(name) for name in embeddings})
        flows, errors = first_flows(model, batches), []
        kept = KeptLayers(work.folder, self.stage, work.seed)
        for place, layer in enumerate(layers):
            work.goes_on()
            work.report(f"layer {place + 1} of {len(layers)}", place / len(layers))
            wanted = through(layer, expected, self.stage.precision)
            state = kept.read(place)
            if state is None:
                weights = self._layer(place, flows, [flow.states for flow in wanted])
                kept.write(place, f"{prefix}.{place}", model, weights)
            else:
                weights = state.put_into(model)
            work.set_quantized(weights)
            flows, expected = through(layer, flows, self.stage.precision), wanted
            errors.append(relative_error(expected, flows))
        return errors

    def behind(self, batches: Sequence[Batch]) -> None:
        """Put what lies behind the layers on its grid."""
        work, model = self.work, self.work.model
        left = [name for name in self.grids if name not in work.quantized]
        head = "lm_head.weight"
        if self.stage.method in ("gptq", "learned") and head in left:
            sums = grams(
                lambda flow: model(*flow.about),
                [Flow(batch.input_ids, batch, None) for batch in batches],
                {head: model.get_submodule("lm_head")},
                self.stage.precision,
            )
            work.set_quantized({head: self._compensated(head, sums[head]).weight})
            left.remove(head)
        work.set_quantized({name: self._rounded(name) for name in left})

    def _layer(
        self, place: int, flows: Sequence[Flow], targets: Sequence[Tensor]
    ) -> dict[str, QuantizedWeight]:
        model, stage = self.work.model, self.stage
        prefix, layers = layers_of(model)
        within = [unit for unit in self.found if unit.layer == place]
        names = [name for unit in within for name in unit.weights]
        if stage.method == "round" or not names:
            return {name: self._rounded(name) for name in names}
        layer = layers[place]
        sums = self._grams(layer, within, flows)
        if stage.method == "awq":
            places = [fold for fold in folds(model) if fold.layer == place]
            scale_salient(model, places, self.grids, sums)
        of = {name: _gram_of(name, unit, sums) for unit in within for name in unit.weights}
        if stage.method == "awq":
            return {
                name: round_weight(self._values(name), self.grids[name], of[name]) for name in names
            }
        made = {name: self._compensated(name, of[name]) for name in names}
        if stage.method == "gptq":
            return {name: each.weight for name, each in made.items()}
        start = {
            name.removeprefix(f"{prefix}.{place}."): Rounding(
                each.latent, self.grids[name], Scales(each.weight.scale, each.weight.zero.float())
            )
            for name, each in made.items()
        }
        seed, goes_on = self.work.seed + place, self.work.goes_on
        learned = learn_rounding(
            layer, start, flows, targets, stage.learned, stage.precision, seed, goes_on
        )
        return {f"{prefix}.{place}.{name}": each for name, each in learned.items()}

    def _grams(
        self, layer: nn.Module, within: Sequence[Unit], flows: Sequence[Flow]
    ) -> dict[str, Tensor]:
        """Return what goes into a layer's units, by the name of each one's first module; of routed
        experts for each gate and down product."""
        model = self.work.model
        firsts = [unit.modules[0].rsplit(".", 2 if unit.is_routed else 0)[0] for unit in within]
        modules = {name: model.get_submodule(name) for name in firsts}
        run = functools.partial(_run_layer, layer)
        return grams(run, flows, modules, self.stage.precision)

    def _values(self, name: str) -> Tensor:
        return weight_of(self.work.model, name)

    def _rounded(self, name: str) -> QuantizedWeight:
        return round_weight(self._values(name), self.grids[name])

    def _compensated(self, name: str, gram: Tensor | None) -> Compensated:
        stage = self.stage
        if gram is None:
            return Compensated(self._rounded(name), self._values(name).clone())
        return gptq(
            self._values(name),
            self.grids[name],
            gram,
            damping=stage.damping,
            by_size=stage.by_size,
        )


def _gram_of(name: str, unit: Unit, sums: Mapping[str, Tensor]) -> Tensor | None:
    """Return the products of what a weight reads; None for an expert that no token chose."""
    if not unit.is_routed:
        return sums[unit.modules[0]]
    return sums.get(name.removesuffix(".weight").replace(".up_proj", ".gate_proj"))


def _run_layer(layer: nn.Module, flow: Flow) -> object:
    return layer(flow.states, flow.about)


def _is_embedding(model: Model, name: str) -> bool:
    return isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Embedding)


def _last_error(stage: Quantize, model: Model, teacher: Model, batches: Sequence[Batch]) -> float:
    """Return the relative squared error of the last layer's output."""
    found, expected = first_flows(model, batches), first_flows(teacher, batches)
    for ours, theirs in zip(layers_of(model)[1], layers_of(teacher)[1], strict=True):
        found = through(ours, found, stage.precision)
        expected = through(theirs, expected, stage.precision)
    return relative_error(expected, found)


def _outcome(
    stage: Quantize, work: Work, grids: dict[str, Grid], errors: Sequence[float]
) -> Outcome:
    about = {
        "method": stage.method,
        "samples": stage.calibration.samples,
        "length": stage.calibration.length,
    }
    made = [work.quantized[name] for name in grids]
    total, numbers = sum(each.num_bytes for each in made), sum(each.codes.numel() for each in made)
    rest = sum(
        parameter.numel()
        for name, parameter in single_weights(work.model)
        if name not in work.quantized
    )
    figures = (
        ("layer_output_error_median", statistics.median(errors), "1"),
        ("layer_output_error_last", errors[-1], "1"),
        ("quantized_weight_bytes", total, "bytes"),
        ("bits_per_quantized_weight", 8 * total / numbers, "bits"),
        ("numbers_not_quantized", rest, "1"),
    )
    return tuple(
        Measurement(name=name, value=float(value), unit=unit, conditions=about)
        for name, value, unit in figures
    )
