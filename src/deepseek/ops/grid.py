"""A matrix on a grid of integers as numpy holds it: what files give and the engine packs. Loads no
torch; `ops.quantized` is the same with tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deepseek.errors import ConfigError, describe
from deepseek.ops.rotation import rotate
from deepseek.ops.scheme import Form, grid_form

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

OFFSET = {4: 8, 8: 128}
"""The middle code of so many bits: what stands for 0 where a grid is symmetric."""


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """A weight [N, K] whose number at (n, k) is `(codes - zero) * scale` of its row and group."""

    bits: int
    """Of a code: 4 or 8."""
    codes: Bytes
    """[N, K]."""
    scale: Floats
    """[N, groups]."""
    zero: Bytes
    """[N, groups]: the code that stands for 0."""
    is_rotated: bool = False
    """Whether these are the numbers behind `rotate`; the weight's are what it gives of them."""
    input_scale: float | None = None
    """Of the int8 numbers that products with it read; None for each token's own."""

    @property
    def group(self) -> int:
        """Channels of one scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels."""
        rows, width = self.codes.shape
        return rows, width

    def read_scales(self) -> tuple[Floats, Bytes]:
        """Return the scales and the zero points: it is a `GridSource` that has been read."""
        return self.scale, self.zero

    def read(self) -> Grid:
        """Return itself."""
        return self

    def values(self) -> Floats:
        """Return the numbers, float32 [N, K]."""
        rows, width = self.codes.shape
        blocks = self.codes.reshape(rows, -1, self.group).astype(np.float32)
        blocks -= self.zero[..., None]
        blocks *= self.scale[..., None]
        values = blocks.reshape(rows, width)
        return rotate(values) if self.is_rotated else values


class GridSource(Protocol):
    """A weight on a grid that is read when it is needed, such as one in a file."""

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels."""
        ...

    @property
    def group(self) -> int:
        """Channels of one scale."""
        ...

    @property
    def is_rotated(self) -> bool:
        """Whether the codes are of the channels behind `rotate`."""
        ...

    @property
    def input_scale(self) -> float | None:
        """Of the int8 numbers that products with it read; None for each token's own."""
        ...

    def read_scales(self) -> tuple[Floats, Bytes]:
        """Return the scales and the zero points, [N, groups]."""
        ...

    def read(self) -> Grid:
        """Return all of it."""
        ...


def form_of(source: GridSource) -> Form | None:
    """Return how the engine holds a weight with the numbers that its grid has; None where it
    cannot."""
    return grid_form(
        source.bits,
        source.group,
        source.shape[1],
        is_rotated=source.is_rotated,
        input_scale=source.input_scale,
    )


def why_not_exact(bits: int, scale: Floats, zero: Bytes) -> str | None:
    """Return why the engine cannot compute with the very numbers of a grid, or None if it can.

    It holds scales in float16 and, of four bits, the number of code 0 in float16 too; eight bits it
    holds symmetric.

    Args:
        bits: of a code.
        scale, zero: as in `Grid`.
    """
    if not np.array_equal(scale.astype(np.float16), scale):
        return "scales that are no float16 numbers"
    if bits == 8 and (zero != OFFSET[8]).any():
        return "eight bits with a zero point other than 128"
    least = scale * -zero.astype(np.float32)
    if bits == 4 and not np.array_equal(least.astype(np.float16), least):
        return "zero points whose product with the scale is no float16 number"
    return None


def why_inexact(grids: Mapping[str, GridSource]) -> str | None:
    """Return why the engine cannot compute with the very numbers of some weights, or None if it
    can; the scales are read for it."""
    for name, grid in grids.items():
        reason = why_not_exact(grid.bits, *grid.read_scales())
        if reason is not None:
            return f"{name} has {reason}"
    return None


def halves_of(grid: Grid, form: Form) -> tuple[Halves, Halves]:
    """Return the scale and the number of code 0 of every row and group of a form, float16
    [N, groups]: those of a wider group are repeated.

    Args:
        grid: the weight.
        form: of `grid_form`.

    Raises:
        ConfigError: float16 does not hold them.
    """
    reason = why_not_exact(grid.bits, grid.scale, grid.zero)
    if reason is not None:
        must = "on a grid that the engine holds exactly"
        step = "Load it with a scheme or a dtype"
        raise ConfigError(describe("weight", "Engine", must, reason, step))
    width = grid.codes.shape[1]
    places = np.arange(0, width, form.group or width) // grid.group
    least = grid.scale * -grid.zero.astype(np.float32)
    return grid.scale[:, places].astype(np.float16), least[:, places].astype(np.float16)
