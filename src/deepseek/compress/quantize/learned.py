"""Rounding that is learned: each number's code and each group's scale, by what a layer gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepseek.compress.quantize.grid import Grid, Scales, as_weight
from deepseek.compress.quantize.walk import Flow, Precision, computing
from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.ops.quantized import QuantizedWeight, short_scale


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

    def _codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, which of them are not cut off, and the latent in steps of its scale."""
        latent = self.latent / self.scale[..., None]
        raw = (latent + self.offset).round_().add_(self.zero)
        codes = raw.clamp(self.grid.bottom, self.grid.top)
        return codes, raw == codes, latent

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers [N, K] as a leaf that takes a gradient for `step`."""
        self._made = self._codes()
        levels = self._made[0] - self.zero
        return (levels * self.scale[..., None]).flatten(-2).to(dtype).requires_grad_()

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move each offset and scale against the sign of its gradient.

        Args:
            gradient: of what `values` gave last [N, K].
            rate: how far an offset goes.
            scale_rate: how far a scale goes, in shares of where it began.
        """
        codes, inside, latent = self._made
        slope = gradient.unflatten(-1, (self.start.shape[1], -1)).float()
        # d value / d scale with the rounding passed straight through
        along = torch.where(inside, codes - self.zero - latent, codes - self.zero)
        self.ratio.sub_((along * slope).sum(-1).sign_(), alpha=scale_rate).clamp_(0.5, 1.5)
        self.offset.sub_(slope.sign_().mul_(inside), alpha=rate).clamp_(-0.5, 0.5)

    def weight(self) -> QuantizedWeight:
        """Return the codes and scales as they are now."""
        codes, _, _ = self._codes()
        scales = Scales(self.scale, self.zero[..., 0])
        return as_weight(codes.flatten(-2), self.grid, scales)


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
            found = functional_call(layer, values, (flow.states, flow.about))
        error = flow.tokens(found.float()) - flow.tokens(targets[place])
        gradients = torch.autograd.grad(error.square().mean(), list(values.values()))
        share = 1 - step / settings.steps
        for rounding, gradient in zip(start.values(), gradients, strict=True):
            rounding.step(gradient, settings.rate * share, settings.scale_rate * share)
    return {name: rounding.weight() for name, rounding in start.items()}
