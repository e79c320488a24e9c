"""Rounding that is learned: each number's code and each group's scale, by what a layer gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepseek.compress.quantize.experts import stacked
from deepseek.compress.quantize.grid import Grid, Scales, as_weight
from deepseek.compress.quantize.walk import Flow, Precision, computing
from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.ops.quantized import QuantizedWeight, short_scale

_TOGETHER = 1 << 15
"""Numbers that are worked on together, so that they stay in the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(Config):
    """How rounding is learned, layer by layer."""

    steps: int = 100
    """Of a layer."""
    rate: float = 0.01
    """What an offset moves in the first step, in shares of the distance of two codes; falls to 0 in
    a line."""
    scale_rate: float = 0.002
    """What a scale moves in the first step, in shares of itself."""
    batch: int = 4
    """Samples of a step."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "Learned", "at least 1", getattr(self, name)))
        for name in ("rate", "scale_rate"):
            if not 0 <= getattr(self, name) <= 0.5:
                must = "from 0 to 0.5"
                raise ConfigError(describe(name, "Learned", must, getattr(self, name)))


class Rounding:
    """One weight whose codes and scales are being learned."""

    def __init__(self, latent: Tensor, grid: Grid, scales: Scales) -> None:
        """Start at the nearest codes.

        Args:
            latent: float32 [N, K], the numbers whose rounding is learned.
            grid: what the codes look like.
            scales: where they start; zero points stay.
        """
        self.grid, self.zero, self.start = grid, scales.zero[..., None], scales.scale
        self.latent = latent.unflatten(-1, (scales.scale.shape[1], -1))
        self.offset = torch.zeros_like(self.latent)
        self.ratio = torch.ones_like(self.start)

    @property
    def scale(self) -> Tensor:
        """The scales as they are stored [N, groups]."""
        return short_scale(self.start * self.ratio)

    def _parts(self) -> Iterator[tuple[slice, _Part]]:
        """Yield rows and what they are now, few enough of them to stay in the cache."""
        scale = self.scale[..., None]
        count = max(1, _TOGETHER // self.latent[0].numel())
        for first in range(0, len(scale), count):
            rows = slice(first, first + count)
            latent = self.latent[rows] / scale[rows]
            raw = (latent + self.offset[rows]).round_().add_(self.zero[rows])
            codes = raw.clamp(self.grid.bottom, self.grid.top)
            yield rows, _Part(codes, codes - self.zero[rows], raw == codes, latent, scale[rows])

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers [N, K] as a leaf that takes a gradient for `step`."""
        made = torch.empty(self.latent.shape, dtype=dtype)
        for rows, part in self._parts():
            made[rows] = part.levels * part.scale
        return made.flatten(-2).requires_grad_()

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move each offset and scale against the sign of its gradient.

        Args:
            gradient: of what `values` gave last [N, K].
            rate: how far an offset goes.
            scale_rate: how far a scale goes, in shares of where it began.
        """
        slopes = gradient.unflatten(-1, self.latent.shape[1:])
        turns = torch.empty_like(self.ratio)
        for rows, part in self._parts():
            slope = slopes[rows].float()
            # d value / d scale with the rounding passed straight through
            along = torch.where(part.inside, part.levels - part.latent, part.levels)
            turns[rows] = (along * slope).sum(-1).sign_()
            offset = self.offset[rows]
            offset.sub_(slope.sign_().mul_(part.inside), alpha=rate).clamp_(-0.5, 0.5)
        self.ratio.sub_(turns, alpha=scale_rate).clamp_(0.5, 1.5)

    def weight(self) -> QuantizedWeight:
        """Return the codes and scales as they are now."""
        codes = torch.cat([part.codes for _, part in self._parts()])
        return as_weight(codes.flatten(-2), self.grid, Scales(self.scale, self.zero[..., 0]))


class _Part(NamedTuple):
    """Some rows of a weight [n, groups, width] while they are being learned."""

    codes: Tensor
    levels: Tensor
    """Codes less the zero point."""
    inside: Tensor
    """Which are not cut off."""
    latent: Tensor
    """In steps of the scale."""
    scale: Tensor
    """[n, groups, 1]."""


def learn_rounding(
    layer: nn.Module,
    start: Mapping[str, Rounding],
    flows: Sequence[Flow],
    targets: Sequence[Tensor],
    settings: Learned,
    precision: Precision,
    seed: int,
    goes_on: Callable[[], None] = lambda: None,
) -> dict[str, QuantizedWeight]:
    """Return weights of a layer whose rounding makes its outputs near what they should be.

    Source: Cheng et al., "SignRound" / AutoRound (2309.05516), section 3: an offset in [-0.5, 0.5]
    for each number before it is rounded, and a range for each group, by signed gradient descent on
    the squared error of a layer's output, the rate falling in a line. Deviations: the range has one
    factor (zero points stay), both start from what `fit` or `gptq` found, and the last step counts,
    not the best.

    Args:
        layer: in float32, with its own weights.
        start: by the weights' names within the layer; learned in place.
        flows: what goes into the layer where all before it is rounded.
        targets: what the layer that is not rounded gives [B, T, hidden], for each flow.
        settings: steps and rates.
        precision: of products.
        seed: of the order of the samples.
        goes_on: called before each step; may raise.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    order: list[int] = []
    for step in range(settings.steps):
        goes_on()
        if not order:
            order = torch.randperm(len(flows), generator=generator).tolist()
        place = order.pop()
        values = {name: rounding.values(dtype) for name, rounding in start.items()}
        flow = flows[place]
        with computing(precision):
            found = functional_call(layer, stacked(layer, values), (flow.states, flow.about))
        error = flow.tokens(found.float()) - flow.tokens(targets[place])
        gradients = torch.autograd.grad(error.square().mean(), list(values.values()))
        share = 1 - step / settings.steps
        for rounding, gradient in zip(start.values(), gradients, strict=True):
            rounding.step(gradient, settings.rate * share, settings.scale_rate * share)
    return {name: rounding.weight() for name, rounding in start.items()}
