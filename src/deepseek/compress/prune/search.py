"""The shape that saves what is to be saved and loses least."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deepseek.compress.prune.cut import Anatomy
from deepseek.compress.prune.latency import LatencyModel
from deepseek.compress.prune.shape import AnyConfig, Part, Shape, filled, resized, shape_of, wanted
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig

Cost = Callable[[Shape], float]
"""Of a shape with every size: parameters, or seconds."""
Loss = Callable[[Shape], float]
"""What a model that was cut to a shape loses, measured."""

_REMOVED = (0.125, 0.25, 0.5)
"""Shares of a part at which its loss is measured: more than the last is never removed."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is lost where one part alone is cut."""

    sizes: tuple[int, ...]
    """Increasing; the last is the whole part."""
    losses: tuple[float, ...]

    def at(self, size: int) -> float:
        """Return the loss at a size, on straight lines between those that were measured."""
        return float(np.interp(size, self.sizes, self.losses))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a search found."""

    shape: Shape
    cost: float
    whole_cost: float
    loss: float
    """What the parts lose by themselves, added."""


def sizes_of(config: AnyConfig, part: Part, multiple: int) -> list[int]:
    """Return the sizes that a part may be cut to, increasing, the last one its own.

    Args:
        config: of the model.
        part: one that it has.
        multiple: of widths and channels; an encoder's width is a multiple of its heads' channels
            too.
    """
    whole = shape_of(config).size(part)
    assert whole is not None
    step = multiple if part in ("width", "channels", "expert_channels") else 1
    if part == "width" and isinstance(config, EncoderConfig):
        step = int(np.lcm(step, config.hidden_size // config.num_heads))
    least = max(1, -(-whole // 2))
    if part == "experts" and isinstance(config, DecoderConfig) and config.experts is not None:
        each = config.experts.num_experts // whole
        least = max(least, -(-config.experts.num_active // each))
    return [*range(-(-least // step) * step, whole, step), whole]


def measured_curve(
    config: AnyConfig, part: Part, sizes: Sequence[int], loss: Loss, whole_loss: float
) -> Curve:
    """Return what is lost when a part is cut, measured at a few of its sizes.

    Args:
        config: of the model.
        part: which is cut.
        sizes: of `sizes_of`.
        loss: cuts the model and measures it.
        whole_loss: of the model as it is.
    """
    whole = sizes[-1]
    chosen = {min(sizes, key=lambda size: abs(size - whole * (1 - share))) for share in _REMOVED}
    losses = {size: loss(Shape(**{part: size})) - whole_loss for size in chosen - {whole}}
    losses[whole] = 0.0
    if sizes[0] not in losses:
        losses[sizes[0]] = loss(Shape(**{part: sizes[0]})) - whole_loss
    places = sorted(losses)
    # a smaller part never counts as better than a larger one, which chance alone can make it
    worst = np.maximum.accumulate([max(0.0, losses[size]) for size in reversed(places)])
    return Curve(tuple(places), tuple(worst[::-1].tolist()))


def search(
    config: AnyConfig,
    curves: Mapping[Part, Curve],
    sizes: Mapping[Part, Sequence[int]],
    cost: Cost,
    share: float,
) -> Choice:
    """Return the shape with the least loss among those that cost at most `1 - share` of the model.

    Losses of parts are added: what two cuts together lose beyond that is not seen. Among equals the
    one that saves least is taken: as much as was asked, and no more.

    Args:
        config: of the model.
        curves: what each part loses.
        sizes: what each part may be cut to; parts without are not cut.
        cost: what is to be saved.
        share: of it, between 0 and 1.

    Raises:
        ConfigError: no such shape is cheap enough.
    """
    whole = filled(config, Shape())
    whole_cost = cost(whole)
    best: Choice | None = None
    cheapest = whole_cost
    every = [[(curves[part].at(size), part, size) for size in sizes[part]] for part in sizes]
    tried = [(sum(each[0] for each in chosen), chosen) for chosen in itertools.product(*every)]
    for loss, chosen in sorted(tried, key=lambda each: each[0]):
        if best is not None and loss > best.loss:
            break
        shape = filled(config, Shape(**{part: size for _, part, size in chosen}))
        found = cost(shape)
        cheapest = min(cheapest, found)
        is_better = best is None or (loss, -found) < (best.loss, -best.cost)
        if found <= (1 - share) * whole_cost and is_better:
            best = Choice(shape, found, whole_cost, loss)
    if best is None:
        must = f"at most {1 - cheapest / whole_cost:.3f}, what the parts that may be cut allow"
        step = "Allow more parts, a smaller multiple, or less"
        raise ConfigError(describe("share", "Prune", must, share, step))
    return best


def parameters_cost(model: Decoder | Encoder, found: Anatomy) -> Cost:
    """Return what counts the parameters of a shape, from the groups alone; layers of two kinds are
    taken as left in equal shares."""
    config = model.config
    cuts: dict[str, list[tuple[int, str, int]]] = {}
    for group, part in zip(found.groups, found.parts, strict=True):
        for name, dim in group.places:
            cuts.setdefault(name, []).append((dim, part, group.num_units))
    layers = shape_of(config).layers
    assert layers is not None
    # what layers of one kind have in common is counted once
    counted: dict[tuple[bool, tuple[int, ...], tuple[tuple[int, str, int], ...]], int] = {}
    for name, parameter in model.named_parameters():
        is_inside = name.startswith(("model.layers.", "encoder.layer."))
        kind = (is_inside, tuple(parameter.shape), tuple(cuts.get(name, ())))
        counted[kind] = counted.get(kind, 0) + 1

    def cost(shape: Shape) -> float:
        assert shape.layers is not None
        total = 0.0
        for (is_inside, sizes, places), count in counted.items():
            elements = float(np.prod(sizes))
            for _, part, units in places:
                elements *= (wanted(part, config, shape) or units) / units
            total += count * elements * (shape.layers / layers if is_inside else 1.0)
        return total

    return cost


def seconds_cost(config: AnyConfig, latency: LatencyModel) -> Cost:
    """Return what predicts the seconds of a shape; layers are taken as alike, so that only models
    of one and two layers are ever counted."""
    memo: dict[Shape, tuple[float, float]] = {}

    def cost(shape: Shape) -> float:
        assert shape.layers is not None
        key = shape.replace(layers=None)
        if key not in memo:
            if shape_of(config).layers == 1:
                return latency.seconds(resized(config, shape, range(1)))
            one, two = (latency.seconds(resized(config, shape, range(n))) for n in (1, 2))
            memo[key] = one, two - one
        first, each = memo[key]
        return first + (shape.layers - 1) * each

    return cost
