"""Reads the container of a GGUF file: metadata, tensor table and, on request, the values of a
tensor.

A GGUF file comes from strangers, so nothing in it is believed: every count and length is held
against the bytes that are there before anything is allocated, and whatever does not fit is one
FormatError that names the
place.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from deepseek.errors import FormatError, describe

Scalar: TypeAlias = str | int | float | bool
Value: TypeAlias = Scalar | list[str] | npt.NDArray[np.generic]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_HEADER_BYTES = 256 << 20
MAX_KEY_BYTES = 65_535
MAX_STRINGS = 4 << 20
MAX_DIMS = 4

_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10
_SCALARS: Mapping[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_SCALAR_STRUCTS: Mapping[int, struct.Struct] = {
    code: struct.Struct("<" + letter) for code, letter in zip(_SCALARS, "BbHhIif?Qqd", strict=True)
}


@dataclasses.dataclass(frozen=True)
class StoredType:
    """How values lie in the file: blocks of `block` values in `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int


STORED_TYPES: Mapping[int, StoredType] = {
    0: StoredType("F32", 1, 4),
    1: StoredType("F16", 1, 2),
    2: StoredType("Q4_0", 32, 18),
    3: StoredType("Q4_1", 32, 20),
    6: StoredType("Q5_0", 32, 22),
    7: StoredType("Q5_1", 32, 24),
    8: StoredType("Q8_0", 32, 34),
    12: StoredType("Q4_K", 256, 144),
    13: StoredType("Q5_K", 256, 176),
    14: StoredType("Q6_K", 256, 210),
    30: StoredType("BF16", 1, 2),
}
"""The types that can be read, by their number in the file. Source: ggml.h, ggml_type and ggml-
common.h.
"""

_REFUSED_TYPES: Mapping[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as torch counts."""
    stored: StoredType
    offset: int
    """Byte at which its data begins, from the start of the file."""
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The checked header of a GGUF file, and access to its data through a read-only map."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    data: npt.NDArray[np.uint8]
    """The whole file, mapped; pages are read when they are touched."""

    def text(self, key: str, default: str | None = None) -> str:
        """Return a metadata value that must be text.

        Raises:
            FormatError: it is absent and there is no default, or it is something else.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._error(f"metadata {key!r}", "text", value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a metadata value that must be an integer of at least 0.

        Raises:
            FormatError: it is absent and there is no default, or it is something else.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._error(f"metadata {key!r}", "an integer of at least 0", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a metadata value that must be a finite number.

        Raises:
            FormatError: it is absent and there is no default, or it is something else.
        """
        value = self.metadata.get(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise self._error(f"metadata {key!r}", "a finite number", value)
        return float(value)

    def strings(self, key: str) -> list[str]:
        """Return a metadata value that must be an array of text.

        Raises:
            FormatError: it is absent or something else.
        """
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise self._error(f"metadata {key!r}", "an array of text", value)
        return value

    def array(self, key: str) -> npt.NDArray[np.generic] | None:
        """Return a metadata value that must be an array of numbers, or None when it is absent.

        Raises:
            FormatError: it is something else.
        """
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise self._error(f"metadata {key!r}", "an array of numbers", value)
        return value

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor as they lie in the file."""
        tensor = self.tensors[name]
        return self.data[tensor.offset : tensor.offset + tensor.num_bytes]

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """Return the values of a tensor in float32, in the tensor's shape.

        Quantized blocks are expanded by `gguf.quants`, the reference of the format's authors.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        stored, raw = tensor.stored, self.raw(name)
        if stored.name == "F32":
            return raw.view("<f4").astype(np.float32, copy=False).reshape(tensor.shape)
        kind = GGMLQuantizationType[stored.name]
        out = np.empty(math.prod(tensor.shape), np.float32)
        for first, count, rows in _spans(tensor.num_bytes // stored.block_bytes, stored.block):
            blocks = raw[first * stored.block_bytes : (first + count) * stored.block_bytes]
            out[first * stored.block : (first + count) * stored.block] = dequantize(
                blocks.reshape(rows, -1), kind
            ).reshape(-1)
        return out.reshape(tensor.shape)

    def _error(self, name: str, must: str, got: object) -> FormatError:
        return FormatError(describe(name, str(self.path), must, got))


def _spans(num_blocks: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first block, number of blocks, rows): pieces that stay in the processor's cache.

    `gguf.quants.dequantize` works through sixteen rows at a time; rows as narrow as a model's make
    it slow, so the blocks, which are independent of each other, are given to it in rows of a size
    of our choice.
    """
    rows, row_blocks = 16, max(1, (1 << 14) // block)
    step = rows * row_blocks * 4
    whole = num_blocks - num_blocks % (rows * row_blocks)
    for first in range(0, whole, step):
        count = min(step, whole - first)
        yield first, count, count // row_blocks
    if whole < num_blocks:
        yield whole, num_blocks - whole, 1


def read_gguf(path: Path) -> GgufFile:
    """Return the header of a GGUF file, with every count, length and offset checked.

    Args:
        path: a file of version 2 or 3, little-endian, in one piece.

    Raises:
        FormatError: it is not such a file, it is cut off, or something in it does not fit together.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(describe("file", "read_gguf", "a GGUF file", str(path)))
    if path.stat().st_size < 24:
        raise FormatError(describe("size", str(path), "at least 24 bytes", path.stat().st_size))
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return _Reader(path, data).read()


class _Reader:
    """One pass over the header, with the position in it."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data
        self.buffer = memoryview(data.data)
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.at = 0

    def read(self) -> GgufFile:
        if bytes(self.buffer[:4]) != MAGIC:
            raise self.error("first four bytes", "'GGUF'", bytes(self.buffer[:4]))
        self.at = 4
        version = self.u32()
        if version & 0xFFFF == 0:
            raise self.error(
                "byte order", "little-endian", "big-endian", "Convert the file to little-endian"
            )
        if version not in VERSIONS:
            raise self.error("version", " or ".join(map(str, VERSIONS)), version)
        num_tensors, num_values = self.u64(), self.u64()
        self.fits("number of tensors", num_tensors, least_bytes=32)
        self.fits("number of metadata values", num_values, least_bytes=13)
        metadata = self.metadata(num_values)
        tensors = self.tensors(num_tensors, self.alignment(metadata))
        split = metadata.get("split.count", 0)
        if isinstance(split, int) and split > 1:
            step = "Join the pieces with llama.cpp's gguf-split --merge"
            raise self.error("number of pieces", "1", split, step)
        return GgufFile(self.path, version, metadata, tensors, self.data)

    def metadata(self, count: int) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for _ in range(count):
            key = self.string("metadata key", MAX_KEY_BYTES)
            if key in values or not key:
                raise self.error("metadata key", "some text, given once", key)
            values[key] = self.value(key)
        return values

    def value(self, key: str) -> Value:
        code = self.u32()
        if code in _SCALARS:
            return self.scalar(code)
        if code == _STRING:
            return self.string(f"metadata {key!r}")
        if code != _ARRAY:
            raise self.error(f"type of metadata {key!r}", "a known type (0 to 12)", code)
        code, count = self.u32(), self.u64()
        if code == _STRING:
            self.fits(f"length of metadata {key!r}", count, least_bytes=8)
            if count > MAX_STRINGS:
                raise self.error(f"length of metadata {key!r}", f"at most {MAX_STRINGS}", count)
            return [self.string(f"metadata {key!r}") for _ in range(count)]
        if code not in _SCALARS:
            raise self.error(f"item type of metadata {key!r}", "a scalar or text", code)
        dtype = np.dtype(_SCALARS[code])
        self.fits(f"length of metadata {key!r}", count, least_bytes=dtype.itemsize)
        start, self.at = self.at, self.at + count * dtype.itemsize
        return (
            np.frombuffer(self.buffer, np.uint8, count * dtype.itemsize, start).view(dtype).copy()
        )

    def alignment(self, metadata: Mapping[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        good = (
            isinstance(alignment, int)
            and 0 < alignment <= MAX_ALIGNMENT
            and alignment & (alignment - 1) == 0
        )
        if not good:
            must = f"a power of two of at most {MAX_ALIGNMENT}"
            raise self.error("general.alignment", must, alignment)
        assert isinstance(alignment, int)
        return alignment

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        entries: dict[str, GgufTensor] = {}
        for _ in range(count):
            tensor = self.tensor()
            if tensor.name in entries or not tensor.name:
                raise self.error("tensor name", "some text, given once", tensor.name)
            entries[tensor.name] = tensor
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, entry in entries.items():
            owner = f"offset of tensor {name!r}"
            if entry.offset % alignment:
                raise self.error(owner, f"a multiple of {alignment}", entry.offset)
            placed = dataclasses.replace(entry, offset=start + entry.offset)
            if placed.offset + placed.num_bytes > len(self.data):
                must = f"such that its {placed.num_bytes} bytes end within the {len(self.data)}"
                raise self.error(owner, must, entry.offset, "The file is cut off: fetch it again")
            tensors[name] = placed
        self.check_overlap(tensors)
        return tensors

    def tensor(self) -> GgufTensor:
        name = self.string("tensor name", MAX_KEY_BYTES)
        num_dims = self.u32()
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.error(
                f"number of dimensions of tensor {name!r}", f"1 to {MAX_DIMS}", num_dims
            )
        dims = [self.u64() for _ in range(num_dims)]
        code, offset = self.u32(), self.u64()
        stored = STORED_TYPES.get(code)
        if stored is None:
            known = ", ".join(kind.name for kind in STORED_TYPES.values())
            got = _REFUSED_TYPES.get(code, f"type number {code}")
            step = "Take a file quantized to one of these"
            raise self.error(f"type of tensor {name!r}", f"one of {known}", got, step)
        size = math.prod(dims)
        if size < 1 or dims[0] % stored.block:
            must = f"positive, the first a multiple of {stored.block} for {stored.name}"
            raise self.error(f"dimensions of tensor {name!r}", must, dims)
        num_bytes = size // stored.block * stored.block_bytes
        if num_bytes > len(self.data):
            must = f"such that its values fit into the {len(self.data)} bytes of the file"
            raise self.error(f"dimensions of tensor {name!r}", must, dims)
        return GgufTensor(name, tuple(reversed(dims)), stored, offset, num_bytes)

    def check_overlap(self, tensors: Mapping[str, GgufTensor]) -> None:
        before: GgufTensor | None = None
        for tensor in sorted(tensors.values(), key=lambda item: item.offset):
            if before is not None and tensor.offset < before.offset + before.num_bytes:
                must = f"after the end of tensor {before.name!r}"
                raise self.error(f"data of tensor {tensor.name!r}", must, "overlapping data")
            before = tensor

    def string(self, what: str, most_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.u64()
        if length > most_bytes or length > self.end - self.at:
            must = f"at most {min(most_bytes, self.end - self.at)} bytes, at byte {self.at}"
            raise self.error(f"length of {what}", must, length)
        start, self.at = self.at, self.at + length
        try:
            return str(self.buffer[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(
                what, "UTF-8 text", bytes(self.buffer[start : self.at][:64])
            ) from error

    def scalar(self, code: int) -> Scalar:
        form = _SCALAR_STRUCTS[code]
        if self.at + form.size > self.end:
            step = "The file is cut off: fetch it again"
            raise self.error("header", "complete", f"its end at byte {self.end}", step)
        (value,) = form.unpack_from(self.buffer, self.at)
        self.at += form.size
        return _plain(value, code)

    def u32(self) -> int:
        return int(self.scalar(_U32))

    def u64(self) -> int:
        return int(self.scalar(_U64))

    def fits(self, what: str, count: int, least_bytes: int) -> None:
        most = (self.end - self.at) // least_bytes
        if count > most:
            raise self.error(what, f"at most {most}, which is what the file has room for", count)

    def error(self, name: str, must: str, got: object, next_step: str = "") -> FormatError:
        return FormatError(describe(name, str(self.path), must, got, next_step))


def _plain(value: int | float | bool, code: int) -> Scalar:
    """Return a scalar as Python means it; a float32 as the shortest decimal that stands for it
    (1e-05).
    """
    if code == 6 and math.isfinite(value):
        return float(str(np.float32(value)))
    return value
