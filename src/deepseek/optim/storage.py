"""How a tensor of training is kept between steps: fewer bits, rounded so that nothing is lost on
average.

Rounding to the nearest would drop every update smaller than half a level. Stochastic rounding goes
up or down with the chance that makes the mean right (Gupta et al., 1502.02551, section 3.1), so
that small updates add up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Storage = Literal["float32", "float16", "bfloat16", "float8"]
BLOCK = 128
"""Values of one scale, float8 only."""
CHUNK = 1 << 17
"""Values that are rounded at once: their words stay in the cache, and threads share them. The
result depends on it, and not on the threads."""

_BITS = {
    torch.float16: 13, torch.bfloat16: 16, torch.float8_e4m3fn: 20, torch.float8_e5m2: 21
}  # fmt: skip
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
        return (
            (_read_float8(self.values) * self.scales)
            .flatten()[: self.shape.numel()]
            .view(self.shape)
        )


class Noise:
    """The chances of the roundings of a step.

    One chunk of random words is drawn, and an odd key for each chunk of a tensor: its chances are
    the lowest bits of words times key. Each is even, and two are as good as independent, so a sum
    of roundings is right in the mean and spreads as if each chance had been drawn by itself; but
    two products that all threads share take a tenth of the time of drawing, which one does alone.

    Source: multiplicative hashing (Dietzfelbinger et al., Journal of Algorithms 25 (1997), 19).
    """

    def __init__(self, generator: torch.Generator) -> None:
        """Take where the chances come from; the same state gives the same roundings."""
        self._generator = generator
        self._words: dict[int, Tensor] = {}

    def chunks(self, num_values: int, bits: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the places of each chunk of a tensor, and that many int32 below 2 ** bits."""
        if bits not in self._words:
            self._words[bits] = self._draw(CHUNK, bits)
        words = self._words[bits]
        for number, key in enumerate(self._draw(-(-num_values // CHUNK), bits).tolist()):
            place = slice(number * CHUNK, min(num_values, (number + 1) * CHUNK))
            chances = words[: place.stop - place.start] * (key | 1)
            yield place, chances.bitwise_and_((1 << bits) - 1)

    def _draw(self, count: int, bits: int) -> Tensor:
        return torch.randint(0, 1 << bits, (count,), dtype=torch.int32, generator=self._generator)


def keep(values: Tensor, storage: Storage, noise: Noise) -> Kept:
    """Return a float32 tensor as it is kept.

    Args:
        values: float32.
        storage: float8 is e4m3 with a scale a block of 128, and e5m2 where nothing is negative, as
            in means of squares: they need its range. Of these none is kept below the smallest
            level, as a step is divided by their roots.
        noise: of the step.
    """
    if storage == "float32":
        return Kept(values.clone())
    if storage != "float8":
        return Kept(stochastic(values, getattr(torch, storage), noise))
    return _keep_float8(values, noise)


def _keep_float8(values: Tensor, noise: Noise) -> Kept:
    is_square = bool((values >= 0).all())
    dtype = torch.float8_e5m2 if is_square else torch.float8_e4m3fn
    largest = torch.finfo(dtype).max
    smallest = (
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if is_square else -largest
    )
    num_blocks = -(-values.numel() // BLOCK)
    kept, scales = torch.empty(num_blocks, BLOCK, dtype=dtype), torch.empty(num_blocks, 1)
    flat = values.reshape(-1)
    for place, chances in noise.chunks(num_blocks * BLOCK, _BITS[dtype]):
        part = flat[place]
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        rows = slice(place.start // BLOCK, place.stop // BLOCK)
        peaks = blocks.abs().amax(1, keepdim=True)
        torch.div(peaks, largest, out=scales[rows])
        # an empty block is divided by 1, and read as empty by its scale
        shares = blocks / torch.where(peaks > 0, scales[rows], 1.0)
        shares.clamp_(smallest, largest)
        kept[rows] = _moved(shares, chances.view_as(shares), dtype)
    return Kept(kept, scales, values.shape)


def stochastic(values: Tensor, dtype: torch.dtype, noise: Noise) -> Tensor:
    """Return float32 values in fewer bits, up or down by chance, right in the mean.

    Args:
        values: for float8 within its range.
        dtype: float16, bfloat16, float8_e4m3fn or float8_e5m2.
        noise: of the step.
    """
    kept = torch.empty(values.shape, dtype=dtype)
    whole, parts = values.reshape(-1), kept.view(-1)
    for place, chances in noise.chunks(values.numel(), _BITS[dtype]):
        parts[place] = _moved(whole[place], chances, dtype)
    return kept


def _moved(values: Tensor, chances: Tensor, dtype: torch.dtype) -> Tensor:
    """Return levels of a type, in float32: random bits are added to those that the type drops, and
    these are cut off. The chances are used up."""
    # any NaN becomes the one with bits to spare: of another, the sum may run over into a number
    values = values.nan_to_num(math.nan, math.inf, -math.inf)
    smallest = torch.finfo(dtype).smallest_normal
    if smallest == torch.finfo(torch.float32).smallest_normal:
        return _cut(values, chances, _BITS[dtype])
    # levels below the smallest normal number are as far apart as those just above it: they are
    # found there. Comparing in place is several times as fast as by `where`
    raised = values.abs().lt_(smallest).mul_(smallest).copysign_(values)
    return _cut(values.add_(raised), chances, _BITS[dtype]).sub_(raised)


def _cut(values: Tensor, chances: Tensor, bits: int) -> Tensor:
    words = chances.add_(values.view(torch.int32)).bitwise_and_(-(1 << bits))
    return words.view(torch.float32)


def _read_float8(values: Tensor) -> Tensor:
    """Return finite numbers in float32: PyTorch's own conversion takes ten times as long."""
    codes = values.view(torch.int8)
    if values.dtype == torch.float8_e5m2:  # the upper half of a float16
        return (codes.to(torch.int16) << 8).view(torch.float16).float()
    # sign, exponent and fraction to where float32 has them; its exponents count from 120 lower
    words = (codes.to(torch.int32) << 20).bitwise_and_(-0x78100000)
    return words.view(torch.float32).mul_(2.0**120)
