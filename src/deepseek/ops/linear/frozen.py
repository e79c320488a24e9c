"""A linear layer whose weight is kept in four bits and is not trained: what low-rank training
stands on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.ops.linear.api import Linear
from deepseek.ops.linear.reference import int4_levels


class FrozenLinear(Linear):
    """A `Linear` whose weight lies on the engine's int4 grid, half a byte a weight and four bytes a
    group. The bias, where there is one, stays as it is; neither is trained.

    Source: Dettmers et al., "QLoRA" (2305.14314), section 3; deviations: the 16 levels are evenly
    spaced, as the engine serves them, and scales are float16.
    """

    def __init__(self, source: nn.Linear, group: int = 32) -> None:
        """Round the weight of a layer.

        Args:
            source: the layer; its input width must be a multiple of two.
            group: weights of one scale.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        weight = source.weight.detach()
        padded = F.pad(weight.float(), (0, -weight.shape[1] % group))
        levels, scale, least = int4_levels(padded, group)
        levels = levels.to(torch.uint8)
        self.codes = nn.Buffer(levels[..., 0::2] | levels[..., 1::2] << 4)
        self.scale, self.least = nn.Buffer(scale.half()), nn.Buffer(least.half())
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach(), False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as the four bits hold it, float32 [out, in], made anew."""
        return unpack(self.codes, self.scale, self.least, self.in_features, torch.float32)

    @property
    def num_bytes(self) -> int:
        """What the weight takes."""
        return self.codes.nbytes + self.scale.nbytes + self.least.nbytes

    def forward(self, input: Tensor) -> Tensor:
        """Return `linear(input, self.weight, self.bias)`: [..., in] to [..., out]; products run in
        the dtype of autocast where it is on."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        out: Tensor = _FrozenProduct.apply(input, self.codes, self.scale, self.least)  # type: ignore[assignment]
        return out if self.bias is None else out + self.bias.to(out.dtype)


def unpack(codes: Tensor, scale: Tensor, least: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return a weight [N, width] of its codes [N, groups, group / 2], two a byte, and the scale and
    least value of each group [N, groups, 1]."""
    levels = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float()
    return levels.mul_(scale.float()).add_(least.float()).flatten(-2)[:, :width].to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """Keeps the codes until the backward pass, and not the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, scale: Tensor, least: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale, least)
        ctx.width = inputs.shape[-1]
        with torch.autocast(inputs.device.type, enabled=False):
            weight = unpack(codes, scale, least, inputs.shape[-1], inputs.dtype)
            return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        with torch.autocast(gradient.device.type, enabled=False):
            codes, scale, least = ctx.saved_tensors
            weight = unpack(codes, scale, least, ctx.width, gradient.dtype)
            return gradient @ weight, None, None, None
