"""How a tensor of training is kept between steps: fewer bits, rounded so that nothing is lost on
average.

Rounding to the nearest would drop every update smaller than half a level. Stochastic rounding goes
up or down with the chance that makes the mean right (Gupta et al., 1502.02551, section 3.1), so
that small updates add up.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Storage = Literal["float32", "float16", "bfloat16", "float8"]
BLOCK = 128
"""Values of one scale, float8 only."""

_BITS = {torch.float16: 13, torch.bfloat16: 16}
"""Bits of float32's fraction that a type drops."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor in few bits, and what is needed to read it."""

    values: Tensor
    scales: Tensor | None = None
    """float32, one a block, float8 only."""
    shape: torch.Size | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def read(self) -> Tensor:
        """Return the tensor in float32."""
        if self.scales is None or self.shape is None:
            return self.values.float()
        return (self.values.float() * self.scales).flatten()[: self.shape.numel()].view(self.shape)


def keep(values: Tensor, storage: Storage, generator: torch.Generator | None = None) -> Kept:
    """Return a float32 tensor as it is kept.

    Args:
        values: float32.
        storage: float8 is e4m3 with a scale a block of 128.
        generator: of the chances; None for PyTorch's own.
    """
    if storage == "float32":
        return Kept(values.clone())
    if storage != "float8":
        return Kept(stochastic(values, getattr(torch, storage), generator))
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = flat.abs().amax(1, keepdim=True) / largest
    shares = torch.where(scales > 0, flat / scales, torch.zeros_like(flat))
    return Kept(_stochastic_e4m3(shares, generator), scales, values.shape)


def stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Return float32 values in float16 or bfloat16, up or down by chance, right in the mean.

    Random bits are added to those that the type drops, and these are cut off. What is below the
    smallest normal number of float16 is rounded to the nearest.
    """
    bits = _BITS[dtype]
    words = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << bits, words.shape, dtype=torch.int32, generator=generator)
    moved = ((words + noise) & -(1 << bits)).view(torch.float32)
    usable = values.isfinite() & (values.abs() >= torch.finfo(dtype).smallest_normal)
    return torch.where(usable, moved, values).to(dtype)


def _stochastic_e4m3(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return values within the range of e4m3, which keeps three bits of the fraction."""
    words = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 20, words.shape, dtype=torch.int32, generator=generator)
    moved = ((words + noise) & -(1 << 20)).view(torch.float32)
    largest = torch.finfo(torch.float8_e4m3fn).max
    usable = values.abs() >= torch.finfo(torch.float8_e4m3fn).smallest_normal
    return torch.where(usable, moved, values).clamp(-largest, largest).to(torch.float8_e4m3fn)
