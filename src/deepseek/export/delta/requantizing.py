"""Puts a fine-tuned model on the grid of the bundle before it, so that most codes stay.

Scales and zero points are the old bundle's; only codes change. A code is re-rounded where its
number has moved past half a step and a margin, and stays otherwise: re-fitted scales, or a rounding
that is learned anew, would change nearly every code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from deepseek.errors import ConfigError, describe
from deepseek.export.delta.making import Report
from deepseek.hub import Bundle
from deepseek.hub.grids import grids_of
from deepseek.ops.grid import Floats, Grid
from deepseek.ops.rotation import rotate
from deepseek.records import Measurement, Parent, StageRecord

if TYPE_CHECKING:
    from deepseek.models import Decoder, Encoder
    from deepseek.ops.quantized import QuantizedWeight

MOST_CLIPPED = 0.05
"""Share of the weights that may lie beyond the ends of the old grid; of an int4 grid, whose ranges
are shrunk on purpose, two in a hundred do."""
_MOST_DISTANCE = 0.5
"""Of a weight from the old one, in shares of the old one's length: a fine-tune is far below it."""


class Moved(NamedTuple):
    """One weight on an old grid."""

    grid: Grid
    num_changed: int
    """Codes that are others than the old ones."""
    num_clipped: int
    """Numbers beyond the ends of the grid."""
    distance: float
    """Of the new numbers from the old ones, in shares of the old ones' length."""


@dataclasses.dataclass(frozen=True)
class OnGrid:
    """A fine-tuned model on an old bundle's grid."""

    bundle: Bundle
    measurements: tuple[Measurement, ...]
    """`changed_codes` and `clipped_weights`, shares of the weights on grids; and
    `kl_divergence` from the fine-tuned model in floats, on this grid and on one of its own."""


def moved(old: Grid, weight: Floats, before: Floats | None = None, *, margin: float = 0.0) -> Moved:
    """Return a weight on an old grid, with the old code wherever its number has not moved.

    Args:
        old: the grid.
        weight: the new numbers, float32 [N, K].
        before: the numbers that the old codes were made of, where they are known. A code that does
            not lie nearest to its number (GPTQ, learned rounding) then stays as long as its number
            stays nearest to the same code.
        margin: in steps: how far past half a step a number must have moved.
    """
    top = (1 << old.bits) - 1
    bottom = 1 if old.bits == 8 and (old.zero == 128).all() else 0
    places = _places(old, weight)
    start = old.codes if before is None else np.rint(_places(old, before))
    stays = np.abs(places - start) <= 0.5 + margin
    nearest = np.rint(places)
    codes = np.where(stays, old.codes, np.clip(nearest, bottom, top)).astype(np.uint8)
    clipped = ~stays & ((nearest < bottom) | (nearest > top))
    was = old.values()
    distance = float(np.linalg.norm(weight - was) / max(np.linalg.norm(was), 1e-30))
    return Moved(
        dataclasses.replace(old, codes=codes),
        int((codes != old.codes).sum()),
        int(clipped.sum()),
        distance,
    )


def fresh_grid(old: Grid, weight: Floats) -> Grid:
    """Return a weight at its nearest codes on a grid of its own: each group's range, as the plain
    way to quantize it would have it."""
    import torch

    from deepseek.ops.quantized import short_scale

    top = (1 << old.bits) - 1
    numbers = rotate(weight) if old.is_rotated else weight
    blocks = numbers.reshape(*old.scale.shape, -1)
    if (old.zero == 1 << (old.bits - 1)).all():
        reach = np.abs(blocks).max(-1) / (top // 2)
        zero = old.zero
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        reach = (high - low) / top
        zero = np.rint(-low / np.where(reach > 0, reach, 1)).clip(0, top).astype(np.uint8)
    scale = short_scale(torch.from_numpy(reach.astype(np.float32))).numpy()
    empty = Grid(old.bits, old.codes, scale, zero, old.is_rotated)
    codes = np.rint(_places(empty, weight)).clip(0, top).astype(np.uint8)
    return dataclasses.replace(empty, codes=codes)


def _places(grid: Grid, weight: Floats) -> Floats:
    """Return where numbers lie between codes, float32 [N, K]."""
    numbers = rotate(weight) if grid.is_rotated else weight
    blocks = numbers.reshape(*grid.scale.shape, -1)
    # a group whose scale is 0 holds zeros alone
    scale = np.where(grid.scale > 0, grid.scale, np.inf)[..., None]
    return (blocks / scale + grid.zero[..., None]).reshape(weight.shape).astype(np.float32)


def on_grid_of(
    old: str | Path | Bundle,
    tuned: str | Path,
    folder: str | Path,
    *,
    before: str | Path | None = None,
    margin: float = 0.0,
    most_clipped: float = MOST_CLIPPED,
    price_tokens: int = 1024,
    report: Report = lambda words, share: None,
) -> OnGrid:
    """Write a fine-tuned model as a bundle on the grid of the bundle before it.

    Args:
        old: the bundle on a grid.
        tuned: the fine-tuned model in floats, its name or folder.
        folder: where the new bundle goes.
        before: the model in floats that `old` was made of: see `moved`.
        margin: in steps, 0 to 0.5: larger ones change fewer codes and lose more of the tuning.
        most_clipped: share of the weights that may lie beyond the ends of the grid.
        price_tokens: of Python's documentation, over which the divergence from the model in floats
            is measured, on the old grid and on a fresh one; 0 for no measurement. Decoders alone.
        report: told what is being done.

    Raises:
        ConfigError: `old` lies on no grid; the model has other weights, lies on a grid itself, is
            no fine-tune of `old`, or is clipped too much; or a setting cannot be.
    """
    from deepseek.hub import Quantized, load, save

    if not 0 <= margin <= 0.5:
        raise ConfigError(describe("margin", "delta make", "from 0 to 0.5", margin))
    base = old if isinstance(old, Bundle) else Bundle.open(Path(old))
    if not base.grids:
        step = "Make it with: deepseek compress MODEL --to int8 --out FOLDER"
        raise ConfigError(describe("OLD", "delta make", "on a grid of integers", "floats", step))
    model = load(tuned, dtype="float32")
    if not isinstance(model.bundle, Bundle) or model.bundle.grids:
        must = "a folder of a model in floats, to be put on a grid"
        raise ConfigError(describe("NEW", "delta make", must, str(tuned)))
    first = None if before is None else _weights(load(before, dtype="float32"))
    found = _all_moved(base, _weights(model), first, margin, report)
    shares = _shares(found, most_clipped)
    settings = {"grid_of": base.content_hash, "margin": margin, "follows": before is not None}
    parents = [(each.card.name, each.content_hash) for each in (model.bundle, base)]
    weights = {name: _quantized(each.grid) for name, each in found.items()}
    report("writing the new bundle", None)
    bundle = save(
        model,
        folder,
        name=model.bundle.card.name,
        parents=[Parent(name=name, content_hash=content) for name, content in parents],
        stage=StageRecord(name="requantize", settings=settings),
        measurements=shares,
        quantized=Quantized(weights=weights, kv=base.kv, layout=_layout(base)),
    )
    prices = _prices(bundle, model, base, price_tokens, report) if price_tokens else ()
    if prices:
        bundle.add_measurements(prices)
    return OnGrid(bundle, (*shares, *prices))


def _weights(model: Decoder | Encoder) -> Mapping[str, Floats]:
    """Return a model's weights by our names, those of experts one by one."""
    from deepseek.models.families import our_name, state_to_hf

    state = state_to_hf(model.config, model.state_dict(), one_by_one=True)
    named = {our_name(model.config, name): value for name, value in state.items()}
    return {name: value.numpy() for name, value in named.items() if name is not None}


def _all_moved(
    base: Bundle,
    weights: Mapping[str, Floats],
    before: Mapping[str, Floats] | None,
    margin: float,
    report: Report,
) -> dict[str, Moved]:
    found, grids = {}, grids_of(base)
    for owner, given in (("NEW", weights), ("the model before", before)):
        if given is not None:
            _check_weights(given, {name: grid.shape for name, grid in grids.items()}, owner)
    for number, (name, source) in enumerate(grids.items()):
        report(f"rounding {name}", number / len(grids))
        start = None if before is None else before[name]
        found[name] = moved(source.read(), weights[name], start, margin=margin)
        if not found[name].distance <= _MOST_DISTANCE:
            must = f"at most {_MOST_DISTANCE} of its length away from OLD's"
            step = "OLD was made of another model, or its method scales channels (awq, equalize)"
            got = round(found[name].distance, 3)
            raise ConfigError(describe(f"weight {name!r}", "NEW", must, got, step))
    return found


def _check_weights(
    weights: Mapping[str, Floats], shapes: Mapping[str, tuple[int, int]], owner: str
) -> None:
    for name, shape in shapes.items():
        given = weights.get(name)
        if given is None or given.shape != shape:
            must = f"of the shape in OLD {list(shape)}"
            got = "no such weight" if given is None else list(given.shape)
            raise ConfigError(describe(f"weight {name!r}", owner, must, got))


def _shares(found: Mapping[str, Moved], most_clipped: float) -> list[Measurement]:
    total = sum(each.grid.codes.size for each in found.values())
    changed = sum(each.num_changed for each in found.values()) / total
    clipped = sum(each.num_clipped for each in found.values()) / total
    if clipped > most_clipped:
        must = f"for at most {most_clipped:g} of them beyond the ends of OLD's grid"
        step = "Compress the fine-tuned model by itself; its delta will be large"
        raise ConfigError(describe("weights", "NEW", must, round(clipped, 5), step))
    return [
        Measurement(name="changed_codes", value=changed, unit="1"),
        Measurement(name="clipped_weights", value=clipped, unit="1"),
    ]


def _quantized(grid: Grid) -> QuantizedWeight:
    from deepseek.ops.quantized import QuantizedWeight

    return QuantizedWeight.of_grid(grid)


def _layout(base: Bundle) -> Literal["compressed-tensors", "gptq"]:
    settings = base.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return "gptq" if method == "gptq" else "compressed-tensors"


def _prices(
    bundle: Bundle, model: Decoder | Encoder, base: Bundle, tokens: int, report: Report
) -> tuple[Measurement, ...]:
    """Return the divergence from a model in floats: on the old grid, and on one of its own."""
    from deepseek.hub import load
    from deepseek.models import Decoder

    if not isinstance(model, Decoder) or model.tokenizer is None:
        return ()
    frozen = load(bundle.path)
    assert isinstance(frozen, Decoder)
    own = _on_own_grid(model, base)
    rows = (("of the old bundle", frozen), ("its own", own))
    return tuple(_price(words, each, model, tokens, report) for words, each in rows)


def _on_own_grid(model: Decoder, base: Bundle) -> Decoder:
    import copy

    from deepseek.models.families import state_from_hf, state_to_hf, their_name
    from deepseek.ops.quantized import QuantizedWeight

    config, other = model.config, copy.deepcopy(model)
    state = state_to_hf(config, model.state_dict(), one_by_one=True)
    for name, source in grids_of(base).items():
        theirs = their_name(config, name)
        grid = fresh_grid(source.read(), state[theirs].numpy())
        state[theirs] = QuantizedWeight.of_grid(grid).values()
    other.load_state_dict(state_from_hf(config, state), strict=False)
    return other


def _price(
    words: str, model: Decoder, reference: Decoder, tokens: int, report: Report
) -> Measurement:
    from deepseek.evaluate import divergence

    window = min(512, tokens, reference.config.max_positions)
    found = divergence(
        model,
        reference,
        max_tokens=tokens,
        window=window,
        stride=window - max(1, window // 8),
        progress=lambda what, share: report(f"divergence on the grid {words}", share),
    )
    kl = found.measurements[0]
    return dataclasses.replace(kl, conditions={**kl.conditions, "grid": words})
