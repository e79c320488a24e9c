"""A model of fewer layers, made of some of another's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepseek.errors import ConfigError, describe
from deepseek.models.decoder import Decoder
from deepseek.models.planner import WindowPlanner
from deepseek.models.routed import RoutedPlanner

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def keep_layers(model: Decoder, layers: Sequence[int]) -> Decoder:
    """Return a decoder with copies of some layers, and of all that stands around them.

    What the layers between did is missing: the model must be trained before it is of use.

    Args:
        model: stays as it is; its tokenizer, bundle and routed attention are handed on.
        layers: which, counted from 0, in order; at least one.

    Raises:
        ConfigError: there is no such layer, they are not in order, or the model's layers differ in
            kind (experts in some).
    """
    config, kept = model.config, list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= config.num_layers:
        must = f"different ones of 0 … {config.num_layers - 1}, in order"
        raise ConfigError(describe("layers", "the model", must, kept))
    if config.experts is not None:
        must = "alike"
        raise ConfigError(describe("layers", "keep_layers", must, "some with experts"))
    windows = tuple(place for place, layer in enumerate(kept) if layer in config.window_layers)
    smaller = Decoder(
        config.replace(num_layers=len(kept), window_layers=windows), impl=model.impl
    ).to(model.dtype)
    places = {layer: place for place, layer in enumerate(kept)}
    state = {}
    for name, value in model.state_dict().items():
        found = _LAYER.match(name)
        if found is None:
            state[name] = value
        elif int(found[1]) in places:
            state[f"model.layers.{places[int(found[1])]}.{name[found.end() :]}"] = value
    smaller.load_state_dict(state)
    if isinstance(model.planner, RoutedPlanner):
        assert smaller.planner is None or isinstance(smaller.planner, WindowPlanner)
        smaller.planner = RoutedPlanner(smaller.config, model.planner.routing, smaller.planner)
    smaller.tokenizer, smaller.bundle = model.tokenizer, model.bundle
    return smaller
