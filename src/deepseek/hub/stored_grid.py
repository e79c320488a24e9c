"""A weight on a grid of integers as a file holds it, and the packing of codes that all layouts
share. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deepseek.errors import FormatError, describe
from deepseek.hub.safetensors import TensorEntry
from deepseek.ops.grid import Bytes, Floats, Grid

_DTYPES: Mapping[str, str] = {
    "I8": "<i1",
    "U8": "<u1",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
}


@dataclasses.dataclass(frozen=True, eq=False)
class StoredGrid:
    """One weight in a file, read when it is asked for; a layout says how. It is a
    `deepseek.ops.grid.GridSource`."""

    folder: Path
    parts: Mapping[str, TensorEntry]
    """What the file holds of it, by the layout's names."""
    bits: int
    shape: tuple[int, int]
    group: int
    """Channels of one scale."""
    is_rotated: bool = False
    """Whether the codes are of the channels behind `deepseek.ops.rotation.rotate`."""
    input_scale: float | None = None
    """Of the int8 numbers that products with it read; None for each token's own."""

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.shape[1] // self.group

    def read_codes(self) -> Bytes:
        """Return the codes, uint8 [N, K]."""
        raise NotImplementedError

    def read_scales(self) -> tuple[Floats, Bytes]:
        """Return the scales, float32 [N, groups], and the zero points, uint8 [N, groups].

        Raises:
            FormatError: a scale is no finite number.
        """
        raise NotImplementedError

    def read(self) -> Grid:
        """Return all of it.

        Raises:
            FormatError: a scale is no finite number, or the file has been cut since it was opened.
        """
        scale, zero = self.read_scales()
        return Grid(self.bits, self.read_codes(), scale, zero, self.is_rotated, self.input_scale)

    def array(self, part: str) -> npt.NDArray[np.generic]:
        """Return one part as the file holds it; bfloat16 as float32."""
        return read_array(self.folder, self.parts[part])

    def finite(self, scale: npt.NDArray[np.generic], name: str) -> Floats:
        """Return scales in float32.

        Raises:
            FormatError: one is no finite number.
        """
        wide = scale.astype(np.float32)
        if not np.isfinite(wide).all():
            raise FormatError(describe(name, str(self.folder), "finite", "inf or nan"))
        return wide


def read_array(folder: Path, entry: TensorEntry) -> npt.NDArray[np.generic]:
    """Return one tensor of a folder; bfloat16 as float32.

    Raises:
        FormatError: it has another type than layouts have, or the file has been cut.
    """
    if entry.dtype not in _DTYPES:
        must = f"one of {', '.join(_DTYPES)}"
        raise FormatError(describe("dtype", str(folder / entry.file), must, entry.dtype))
    found = np.fromfile(
        folder / entry.file, _DTYPES[entry.dtype], entry.num_elements, offset=entry.offset
    )
    if len(found) != entry.num_elements:
        must = f"{entry.num_elements} values at byte {entry.offset}"
        raise FormatError(describe("data", str(folder / entry.file), must, len(found)))
    if entry.dtype == "BF16":
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return found.reshape(entry.shape)


def check_part(
    parts: Mapping[str, TensorEntry], part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    """Raise a FormatError unless a part is there with a type and a shape.

    Args:
        parts: what the file holds of a weight.
        part: its name there.
        dtypes: types it may have.
        shape: what it must have.
    """
    entry = parts.get(part)
    if entry is None:
        raise FormatError(describe(part, "a quantized weight", "there", "no such tensor"))
    if entry.dtype not in dtypes or entry.shape != shape:
        must = f"{' or '.join(dtypes)} {list(shape)}"
        got = f"{entry.dtype} {list(entry.shape)}"
        raise FormatError(describe(part, entry.file, must, got))


def pack_rows(codes: Bytes, bits: int) -> npt.NDArray[np.int32]:
    """Return codes [R, C] in words int32 [R, ceil(C * bits / 32)], the first in the lowest bits.

    Args:
        codes: uint8, below 2**bits.
        bits: 4 or 8.
    """
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    if bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << 4
    return np.ascontiguousarray(padded).view("<i4")


def unpack_rows(words: npt.NDArray[np.generic], bits: int, count: int) -> Bytes:
    """Return the first `count` codes of each row of words int32 [R, W]: uint8 [R, count]."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return np.ascontiguousarray(packed[:, :count])
    codes = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return np.ascontiguousarray(codes[:, :count])
