"""How much a model would miss each unit and each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.compress.calibration import Batch
from deepseek.compress.prune.cut import Anatomy, layers_of
from deepseek.compress.prune.groups import Dimension, Group
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder

Importance = Literal["activation", "magnitude", "taylor"]


def unit_scores(
    model: Decoder | Encoder,
    found: Anatomy,
    importance: Importance,
    batches: Sequence[Batch],
    goes_on: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Return the score of every unit, float32 [units] of each group.

    activation: the mean square of what the unit gives times the squared norm of the weights that
    read it, as a share of the same of all units, summed over the layers' products that read it:
    what these products lose by it, were the units independent (Wanda's score, 2306.11695, section
    3, squared and summed over a unit). The head is left out; the pooler, which no product reads,
    goes by magnitude.

    magnitude: the norm of all weights of the unit (DepGraph, 2301.12900, section 3.2).

    taylor: how much the loss would change to first order if what reads the unit were zero, its
    absolute value meant over batches (Molchanov et al., 1906.10771, equation 8; LLM-Pruner,
    2305.11627, section 3.2); of experts, if all of the unit were.

    Args:
        model: in eval mode; its gradients are None afterwards.
        found: its groups.
        importance: which score.
        batches: samples; magnitude looks at none.
        goes_on: called between batches.

    Raises:
        ConfigError: the score is not defined for this model.
    """
    if importance == "magnitude":
        return [_magnitude(model, group) for group in found.groups]
    if importance == "activation":
        return _activation(model, found, batches, goes_on)
    return _taylor(model, found, batches, goes_on)


def _magnitude(model: nn.Module, group: Group) -> Tensor:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    total = torch.zeros(group.num_units)
    for dimension in group.places:
        values = tensors[dimension[0]].detach()
        total += _by_unit(values.square(), dimension, group)
    return total.sqrt()


def _by_unit(values: Tensor, dimension: Dimension, group: Group) -> Tensor:
    """Return values summed over what a unit has of a dimension: [units]."""
    others = [dim for dim in range(values.dim()) if dim != dimension[1]]
    line = values.sum(others) if others else values
    return line.float()[group.places[dimension]].sum(1)


def _activation(
    model: Decoder | Encoder,
    found: Anatomy,
    batches: Sequence[Batch],
    goes_on: Callable[[], None],
) -> list[Tensor]:
    squares = input_squares(model, batches, goes_on)
    scores = []
    for group, part in zip(found.groups, found.parts, strict=True):
        if part == "pooler":  # nothing in the model reads it
            scores.append(_magnitude(model, group))
            continue
        total = torch.zeros(group.num_units)
        read = [dimension for dimension in group.read if dimension[0] in squares]
        if not read:
            must = "magnitude or taylor where there are experts, inside which no input is seen"
            raise ConfigError(describe(f"importance of {part}", "Prune", must, "activation"))
        for name, dim in read:
            weight = model.get_parameter(name).detach().square()
            share = _by_unit(weight * squares[name], (name, dim), group)
            total += share / share.sum().clamp_min(1e-30)
        scores.append(total)
    return scores


def input_squares(
    model: Decoder | Encoder, batches: Sequence[Batch], goes_on: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Return the mean square of each input channel of every linear layer, float32 [in], by the name
    of its weight.

    Args:
        model: in eval mode.
        batches: samples; padding does not count.
        goes_on: called between batches.
    """
    sums: dict[str, Tensor] = {}
    count = 0.0
    mask: Tensor | None = None

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            states = args[0].detach().float()
            squares = states.square()
            if mask is not None and squares.shape[:2] == mask.shape:
                squares = squares * mask[..., None]
            sums[name] = sums.get(name, 0) + squares.flatten(0, -2).sum(0)

        return hook

    linears = [(f"{name}.weight", m) for name, m in model.named_modules() if _is_linear(m)]
    with _hooked([m.register_forward_pre_hook(watch(name)) for name, m in linears]):
        for batch in batches:
            goes_on()
            mask = batch.attention_mask
            count += float(batch.input_ids.numel() if mask is None else mask.sum())
            run(model, batch)
    return {name: total / count for name, total in sums.items()}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _taylor(
    model: Decoder | Encoder,
    found: Anatomy,
    batches: Sequence[Batch],
    goes_on: Callable[[], None],
) -> list[Tensor]:
    if not isinstance(model, Decoder):
        must = "activation or magnitude for an encoder, which has no loss on plain text"
        raise ConfigError(describe("importance", "Prune", must, "taylor"))
    scores = [torch.zeros(group.num_units) for group in found.groups]
    parameters = dict(model.named_parameters())
    needed = {name: each.requires_grad for name, each in parameters.items()}
    model.requires_grad_(True)
    try:
        for batch in batches:
            goes_on()
            model.loss(batch.input_ids, batch.input_ids).backward()
            changes = {
                name: each.detach() * each.grad
                for name, each in parameters.items()
                if each.grad is not None
            }
            for score, group in zip(scores, found.groups, strict=True):
                change = torch.zeros(group.num_units)
                for dimension in group.read or group.places:
                    if dimension[0] in changes:
                        change += _by_unit(changes[dimension[0]], dimension, group)
                score += change.abs() / len(batches)
            model.zero_grad(set_to_none=True)
    finally:
        model.zero_grad(set_to_none=True)
        for name, each in parameters.items():
            each.requires_grad_(needed[name])
    return scores


def layer_scores(
    model: Decoder | Encoder, batches: Sequence[Batch], goes_on: Callable[[], None] = lambda: None
) -> Tensor:
    """Return how much each layer changes the states that it is given, float32 [layers]: one minus
    the cosine between input and output, meant over tokens.

    Source: "block influence" of ShortGPT (2403.03853), section 3.1.

    Args:
        model: in eval mode.
        batches: samples.
        goes_on: called between batches.
    """
    layers = layers_of(model)
    sums = torch.zeros(len(layers))
    count = 0.0
    mask: Tensor | None = None

    def watch(place: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            change = 1 - F.cosine_similarity(args[0].float(), output.float(), dim=-1)
            sums[place] += (change if mask is None else change * mask).sum()

        return hook

    handles = [layer.register_forward_hook(watch(place)) for place, layer in enumerate(layers)]
    with _hooked(handles):
        for batch in batches:
            goes_on()
            mask = batch.attention_mask
            count += float(batch.input_ids.numel() if mask is None else mask.sum())
            run(model, batch)
    return sums / count


def run(model: Decoder | Encoder, batch: Batch) -> Tensor:
    """Return the final states of a batch, without gradient: [B, T, hidden]."""
    with torch.no_grad():
        if isinstance(model, Encoder):
            return model(batch.input_ids, batch.attention_mask).last_hidden_state
        return model.final_states(batch.input_ids)


@contextlib.contextmanager
def _hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
