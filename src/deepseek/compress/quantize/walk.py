"""A model's layers one after the other: what goes into each, and what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from deepseek.compress.calibration import Batch
from deepseek.compress.quantize.experts import inputs_of
from deepseek.compress.quantize.targets import Model, layers_of
from deepseek.models.layers import ExpertWeights

Precision = Literal["float32", "bfloat16"]
"""Of products while measuring and learning; what is rounded and stored is float32."""


def computing(precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Return a context in which products are computed in a precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    # no cache: weights change between two products of one context
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


class Flow(NamedTuple):
    """Samples on their way between two layers."""

    states: Tensor
    """float32 [B, T, hidden]."""
    about: Any
    """What the layer takes beside them: places, positions, mask."""
    mask: Tensor | None
    """bool [B, T], what is no padding; None for all."""

    def tokens(self, states: Tensor) -> Tensor:
        """Return the rows [tokens, ...] of states [B, T, ...] that are no padding."""
        return states.flatten(0, 1) if self.mask is None else states[self.mask]


class _Stopped(Exception):
    pass


def first_flows(model: Model, batches: Sequence[Batch]) -> list[Flow]:
    """Return what goes into the first layer."""
    found: list[Flow] = []

    def catch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        states, about = arguments
        found.append(Flow(states, about, None if mask is None else mask.bool()))
        raise _Stopped

    handle = layers_of(model)[1][0].register_forward_pre_hook(catch)
    try:
        for input_ids, mask in batches:
            with contextlib.suppress(_Stopped), torch.no_grad():
                model(input_ids, mask)
    finally:
        handle.remove()
    return found


def through(layer: nn.Module, flows: Sequence[Flow], precision: Precision) -> list[Flow]:
    """Return what comes out of a layer."""
    with torch.no_grad(), computing(precision):
        return [flow._replace(states=layer(flow.states, flow.about).float()) for flow in flows]


@contextlib.contextmanager
def watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Show what goes into modules while they run: name and arguments."""

    def shown(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, given: see(name, given)

    handles = [each.register_forward_pre_hook(shown(name)) for name, each in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def grams(
    layer: Callable[[Flow], object],
    flows: Sequence[Flow],
    modules: Mapping[str, nn.Module],
    precision: Precision,
) -> dict[str, Tensor]:
    """Return the mean products `x.T @ x` [K, K] of what goes into modules.

    Args:
        layer: runs one flow through what the modules are in.
        flows: the samples.
        modules: by any name; a stack of experts gives those of `inputs_of`, for each expert that
            was chosen.
        precision: of the layer's products; those of the inputs are float32.
    """
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name: str, rows: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            wide = rows.float()
            sums[name] = sums.get(name, torch.zeros(())) + wide.T @ wide

    for flow in flows:

        def see(name: str, given: tuple[Any, ...], flow: Flow = flow) -> None:
            module = modules[name]
            if not isinstance(module, ExpertWeights):
                add(name, flow.tokens(given[0]))
                return
            tokens, chosen = given[:2]
            if flow.mask is not None:
                tokens, chosen = (each[flow.mask.flatten()] for each in (tokens, chosen))
            for product, rows in inputs_of(module, tokens, chosen):
                add(f"{name}.{product}", rows)

        with watching(modules, see), torch.no_grad(), computing(precision):
            layer(flow)
        count += flow.states.shape[:2].numel() if flow.mask is None else int(flow.mask.sum())
    return {name: total / count for name, total in sums.items()}


def relative_error(expected: Sequence[Flow], found: Sequence[Flow]) -> float:
    """Return the squared error of states over the sum of their squares, padding left out."""
    error = total = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        error += float((ours.tokens(ours.states) - theirs.tokens(theirs.states)).square().sum())
        total += float(theirs.tokens(theirs.states).square().sum())
    return error / max(total, 1e-30)
