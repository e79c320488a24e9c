"""Channels that carry much are made larger before they are rounded, and their inputs smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepseek.compress.quantize.folds import Fold, apply_fold
from deepseek.compress.quantize.grid import Grid, nearest, own_range
from deepseek.compress.quantize.targets import Model

_POWERS = tuple(step / 20 for step in range(20))


def scale_salient(
    model: Model, places: Sequence[Fold], grids: Mapping[str, Grid], grams: dict[str, Tensor]
) -> None:
    """Fold the factors by which rounding changes the outputs of each place least into the model.

    Source: Lin et al., "AWQ" (2306.00978), section 3.2: factors `|x| ** power`, the power searched
    in [0, 1). Deviations: |x| is the root mean square; the error is of the products' own outputs,
    by their inputs' gram, and not of the block around them; values and outputs of grouped queries
    share a factor for the heads that share values.

    Args:
        model: changed in place; computes what it did.
        places: in the order of the pass.
        grids: by name of weight; a weight without one counts nothing.
        grams: inputs' mean products by the name of the module that sees them; changed to what the
            inputs are behind the folds.
    """
    for place in places:
        gram = grams.get(place.sees)
        weights = {name: grids[name] for name in place.consumers if name in grids}
        if gram is None or not weights:
            continue
        factor = _best_factor(model, place, weights, gram)
        apply_fold(model, place, factor)
        spread = place.spread(factor)
        grams[place.sees] = gram / (spread[:, None] * spread)


def _best_factor(model: Model, place: Fold, weights: Mapping[str, Grid], gram: Tensor) -> Tensor:
    size = place.gathered(gram.diagonal().sqrt()).clamp(min=1e-6)
    best, least = torch.ones_like(size), float("inf")
    for power in _POWERS:
        factor = size**power
        factor = factor / (factor.max() * factor.min()).sqrt()
        spread, error = place.spread(factor), 0.0
        for name, grid in weights.items():
            weight = model.get_parameter(name).data
            scaled = weight * spread
            change = nearest(scaled, grid, own_range(scaled, grid)).values() / spread - weight
            error += float(((change @ gram) * change).sum())
        if error < least:
            best, least = factor, error
    return best
