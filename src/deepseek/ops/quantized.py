"""A matrix on a grid of integers: codes, and the scales that turn them into numbers."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.ops.grid import Grid
from deepseek.ops.rotation import STEPS
from deepseek.ops.scheme import ROTATED

_SCALE_BITS = 7
"""Significant bits of a scale: a zero point of four bits times such a scale is a float16 number."""


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] whose number at (n, k) is `(codes - zero) * scale` of its row and group.

    Every format that we write says the same numbers: int8 per channel is one group a row with
    `zero` 128, Q4_1 of GGUF has `zero * scale` as its minimum.
    """

    bits: int
    """Of a code: 4 or 8."""
    codes: Tensor
    """uint8 [N, K], 0 to 2**bits - 1."""
    scale: Tensor
    """float32 [N, groups], each a float16 number."""
    zero: Tensor
    """uint8 [N, groups]: the code that stands for 0."""
    is_rotated: bool = False
    """Whether these are the numbers behind `rotate`; the weight's are what it gives of them. Eight
    bits and a width and groups of multiples of 64 alone."""
    input_scale: float | None = None
    """Of the int8 numbers that products with it read, behind `rotate` where it is rotated: a
    static scale, a float32 number. None for each token's own."""

    def __post_init__(self) -> None:
        rows, width = self.codes.shape
        fits = self.scale.shape == self.zero.shape and self.scale.shape[0] == rows
        if not fits or width % self.scale.shape[1]:
            got = f"{list(self.scale.shape)} and {list(self.zero.shape)}"
            must = f"[{rows}, a divisor of {width}]"
            raise ShapeError(describe("scale and zero", "QuantizedWeight", must, got))
        if self.is_rotated and (self.bits != 8 or self.group % ROTATED):
            must = f"of 8 bits in groups of a multiple of {ROTATED}"
            got = f"{self.bits} bits in groups of {self.group}"
            raise ShapeError(describe("rotated weight", "QuantizedWeight", must, got))
        if self.input_scale is not None and not 0 < self.input_scale < math.inf:
            must = "above 0 and finite, or None"
            raise ConfigError(describe("input_scale", "QuantizedWeight", must, self.input_scale))

    @property
    def group(self) -> int:
        """Channels of one scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def is_symmetric(self) -> bool:
        """Whether the middle code stands for 0 in every group."""
        return bool((self.zero == 1 << (self.bits - 1)).all())

    def numbers(self) -> Tensor:
        """Return what the codes stand for, float32 [N, K]: rotated channels as they are."""
        blocks = self.codes.unflatten(-1, (-1, self.group)).float()
        return ((blocks - self.zero[..., None].float()) * self.scale[..., None]).flatten(-2)

    def values(self) -> Tensor:
        """Return the weight, float32 [N, K]."""
        return rotate(self.numbers()) if self.is_rotated else self.numbers()

    @classmethod
    def of_grid(cls, grid: Grid) -> QuantizedWeight:
        """Return the weight that numpy arrays hold, in place."""
        codes, scale, zero = map(torch.from_numpy, (grid.codes, grid.scale, grid.zero))
        return cls(grid.bits, codes, scale, zero, grid.is_rotated, grid.input_scale)

    def grid(self) -> Grid:
        """Return the weight as numpy arrays, in place where it lies on the CPU."""
        codes, scale, zero = (
            part.detach().cpu().contiguous().numpy() for part in (self.codes, self.scale, self.zero)
        )
        return Grid(self.bits, codes, scale, zero, self.is_rotated, self.input_scale)

    @property
    def num_bytes(self) -> int:
        """What codes, scales in float16 and zero points take, packed."""
        zeros = 0 if self.is_symmetric else self.zero.numel() * self.bits // 8
        return self.codes.numel() * self.bits // 8 + self.scale.numel() * 2 + zeros


def rotate(states: Tensor) -> Tensor:
    """Return every 64 channels [..., K] behind an orthogonal Walsh-Hadamard transform: its own
    inverse. Outliers spread over the block, so that one scale serves it; see `ops.rotation`."""
    for step in STEPS:
        pairs = states.unflatten(-1, (-1, 2, step))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        states = torch.stack((first + second, first - second), -2).flatten(-3)
    return states * ROTATED**-0.5


def short_scale(scale: Tensor) -> Tensor:
    """Return scales rounded to seven significant bits, float32 that float16 holds exactly, and with
    them every product with a zero point of four bits: what turns a code into a number is then the
    same in every format. Below float16's normal numbers some exactness is lost.

    Args:
        scale: float32, any shape, not negative.
    """
    mantissa, exponent = torch.frexp(scale)
    short = torch.ldexp((mantissa * 2**_SCALE_BITS).round() / 2**_SCALE_BITS, exponent)
    return short.half().float()
