"""A model without some of its units."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from deepseek.compress.prune.groups import Group, find_groups
from deepseek.compress.prune.shape import Shape, filled, part_of, resized, shape_of, wanted
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig, RoutedPlanner
from deepseek.models.families import build_model, config_to_hf
from deepseek.models.layers import RMSNorm
from deepseek.models.planner import WindowPlanner

_TRACED_TOKENS = 32
_LAYER = re.compile(r"^(model\.layers|encoder\.layer)\.(\d+)\.")


@dataclasses.dataclass(frozen=True, eq=False)
class Anatomy:
    """The groups of a model, each with the part of its config that it belongs to."""

    groups: tuple[Group, ...]
    parts: tuple[str, ...]
    """Of each group."""

    def of(self, part: str) -> list[Group]:
        """Return the groups of a part."""
        return [group for group, each in zip(self.groups, self.parts, strict=True) if each == part]


def anatomy(model: Decoder | Encoder) -> Anatomy:
    """Return what can be cut of a model."""
    found = []
    for group in find_groups(model, lambda: _run(model)):
        part = part_of(group, model.config)
        if part is not None:
            found.append((group, part))
    return Anatomy(tuple(group for group, _ in found), tuple(part for _, part in found))


def _run(model: Decoder | Encoder) -> object:
    length = min(_TRACED_TOKENS, model.config.max_positions)
    ids = torch.arange(length)[None] * 7919 % model.config.vocab_size
    if isinstance(model, Encoder):
        return tuple(model(ids))
    # which blocks attention sees is no matter of channels
    planner, model.planner = model.planner, None
    try:
        return model(ids).logits
    finally:
        model.planner = planner


def layers_of(model: Decoder | Encoder) -> nn.ModuleList:
    """Return the layers of a model."""
    return model.model.layers if isinstance(model, Decoder) else model.encoder.layer


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """What of a model is kept."""

    shape: Shape
    """With every size."""
    layers: tuple[int, ...]
    units: tuple[Tensor, ...]
    """Int64, of each group of the anatomy, in order."""


def keep_best(
    model: Decoder | Encoder,
    found: Anatomy,
    scores: Sequence[Tensor],
    layer_scores: Tensor,
    shape: Shape,
) -> Kept:
    """Return what is kept to come to a shape: the units and layers that score highest, as many in
    every layer, because a config has one size for all.

    Args:
        model: as it is.
        found: its groups.
        scores: float [units] of each group.
        layer_scores: float [layers].
        shape: to come to.

    Raises:
        ConfigError: the shape cannot be come to.
    """
    shape = filled(model.config, shape)
    units = []
    for group, part, score in zip(found.groups, found.parts, scores, strict=True):
        count = wanted(part, model.config, shape)
        units.append(score.topk(count or group.num_units).indices.sort().values)
    for part, size in shape.sizes.items():
        if part != "layers" and size != shape_of(model.config).size(part) and not found.of(part):
            must = "None: no unit of it can be removed from this model"
            raise ConfigError(describe(part, "Shape", must, size))
    assert shape.layers is not None
    layers = layer_scores.topk(shape.layers).indices.sort().values.tolist()
    return Kept(shape, tuple(layers), tuple(units))


def cut(model: Decoder | Encoder, found: Anatomy, kept: Kept) -> Decoder | Encoder:
    """Return a model with copies of what is kept; its config says so.

    Raises:
        FormatError: the model's family cannot express it.
    """
    config = resized(model.config, kept.shape, kept.layers)
    config_to_hf(config)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for group, units in zip(found.groups, kept.units, strict=True):
        if len(units) == group.num_units:
            continue
        for name, dim in group.places:
            state[name] = state[name].index_select(dim, group.kept_places((name, dim), units))
    own = {name: value.clone() for name, value in _renumbered(state, kept.layers).items()}
    return rebuilt(model, config, own)


def rebuilt(
    model: Decoder | Encoder, config: DecoderConfig | EncoderConfig, state: Mapping[str, Tensor]
) -> Decoder | Encoder:
    """Return a model of another config, with what of a model is no weight.

    Args:
        model: stays as it is.
        config: of the new one.
        state: its weights, which become its own; a tied head is taken from the embedding.
    """
    with torch.device("meta"):
        made = build_model(config)
    if isinstance(config, DecoderConfig) and config.tie_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    made.load_state_dict(state, assign=True)
    if isinstance(made, Decoder) and made.config.tie_embeddings:
        made.lm_head.weight = made.model.embed_tokens.weight
    return _dressed(made.eval(), model)


def _renumbered(state: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    places = {layer: place for place, layer in enumerate(layers)}

    def name_of(name: str) -> str | None:
        found = _LAYER.match(name)
        if found is None:
            return name
        place = places.get(int(found[2]))
        return None if place is None else f"{found[1]}.{place}.{name[found.end() :]}"

    renamed = {name_of(name): value for name, value in state.items()}
    return {name: value for name, value in renamed.items() if name is not None}


def _dressed(smaller: Decoder | Encoder, model: Decoder | Encoder) -> Decoder | Encoder:
    """Hand on what is no weight."""
    smaller.tokenizer, smaller.bundle = model.tokenizer, model.bundle
    if isinstance(smaller, Decoder) and isinstance(model, Decoder):
        smaller.impl = model.impl
        if isinstance(model.planner, RoutedPlanner):
            assert smaller.planner is None or isinstance(smaller.planner, WindowPlanner)
            smaller.planner = RoutedPlanner(smaller.config, model.planner.routing, smaller.planner)
    return smaller


def steady_norms(
    model: Decoder | Encoder,
    smaller: Decoder | Encoder,
    found: Anatomy,
    kept: Kept,
    run: Callable[[], None],
) -> None:
    """Scale the norms of a model whose width was cut, in place, so that what is left of a state
    keeps its size: a norm divides by the mean over all channels, and that of those that are kept is
    another.

    Args:
        model: before the cut.
        smaller: of `cut`.
        found, kept: of both.
        run: runs the model over samples.
    """
    widths = [
        (group, units)
        for group, part, units in zip(found.groups, found.parts, kept.units, strict=True)
        if part == "width" and len(units) < group.num_units
    ]
    for group, units in widths:
        ratios: dict[str, list[Tensor]] = {}
        handles = [
            module.register_forward_pre_hook(_watch(ratios.setdefault(name, []), module, units))
            for name, module in model.named_modules()
            if (f"{name}.weight", 0) in group.places and isinstance(module, RMSNorm | nn.LayerNorm)
        ]
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        scales = {f"{name}.weight": torch.cat(each).mean() for name, each in ratios.items()}
        for name, scale in _renumbered(scales, kept.layers).items():
            smaller.get_parameter(name).data.mul_(scale)


def _watch(
    ratios: list[Tensor], module: nn.Module, units: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    is_centred = isinstance(module, nn.LayerNorm)

    def size(states: Tensor) -> Tensor:
        return states.var(-1, correction=0) if is_centred else states.square().mean(-1)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        states = args[0].detach().float()
        whole = size(states)
        ratios.append((size(states[..., units]) / whole.clamp_min(1e-30)).sqrt().flatten())

    return hook
