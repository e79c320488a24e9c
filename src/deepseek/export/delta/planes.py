"""The entropy code of differences between integer codes: bit planes in zlib's Huffman code.

A difference is mostly 0, and +1 or -1 else. So it is written as planes: which are not 0; the signs
of those; which of those are larger than 1; of those, larger than 2; and what is left of the few
larger ones in bytes. A plane is its bits, or the gaps between its ones, under Huffman's code or as
it is, whichever is shortest. On independent differences this is within 2 % of their entropy
(`benchmarks/delta.py`) and needs nothing but the standard library.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek.errors import FormatError, describe

Signed = npt.NDArray[np.int8]
Flags = npt.NDArray[np.bool_]

_LEVELS = 4
"""Sizes that have a plane of their own."""
_RAW, _BITS, _GAPS = range(3)
_HEAD = struct.Struct("<BI")
_ESCAPE = 255
"""A gap of so many zeros that goes on in the next byte."""


class _Reader(NamedTuple):
    """What is left of a code to read."""

    data: memoryview
    at: list[int]

    def take(self, count: int) -> memoryview:
        start = self.at[0]
        if start + count > len(self.data):
            raise _refuse("long enough", f"{len(self.data)} bytes")
        self.at[0] = start + count
        return self.data[start : start + count]


def encode(values: Signed) -> bytes:
    """Return the code of differences, int8 [N]."""
    flags = values != 0
    parts = [_write_plane(flags)]
    rest = values[flags]
    parts.append(_write_plane(rest < 0))
    sizes = np.abs(rest.astype(np.int16))
    for level in range(1, _LEVELS):
        if not len(sizes):
            break
        flags = sizes > level
        parts.append(_write_plane(flags))
        sizes = sizes[flags]
    if len(sizes):
        parts.append(_write_block(_RAW, (sizes - _LEVELS).astype(np.uint8).tobytes()))
    return b"".join(parts)


def decode(code: bytes | memoryview, count: int) -> Signed:
    """Return the `count` differences that a code stands for, int8 [count].

    Needs memory for a few times `count` bytes, whatever the code says.

    Raises:
        FormatError: it is not a code of so many.
    """
    reader = _Reader(memoryview(code), [0])
    places = np.flatnonzero(_read_plane(reader, count))
    is_negative = _read_plane(reader, len(places))
    sizes = np.ones(len(places), np.int16)
    large = np.arange(len(places))
    for _ in range(1, _LEVELS):
        if not len(large):
            break
        large = large[_read_plane(reader, len(large))]
        sizes[large] += 1
    if len(large):
        rest = np.frombuffer(_read_block(reader, len(large))[1], np.uint8)
        if len(rest) != len(large):
            raise _refuse(f"{len(large)} bytes long in its last block", len(rest))
        sizes[large] += rest
    if reader.at[0] != len(reader.data):
        raise _refuse(f"{reader.at[0]} bytes long", len(reader.data))
    if len(sizes) and sizes.max() > 128:
        raise _refuse("of differences up to 128", int(sizes.max()))
    values = np.zeros(count, np.int8)
    values[places] = np.where(is_negative, -sizes, sizes).astype(np.int8)
    return values


def entropy_bytes(values: npt.NDArray[np.generic]) -> float:
    """Return what independent values of this spread take at least, in bytes."""
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum() * values.size / 8)


def _write_plane(flags: Flags) -> bytes:
    """Return flags by their bits or by the gaps between them."""
    bits = _write_block(_BITS, np.packbits(flags).tobytes())
    if 2 * np.count_nonzero(flags) > len(flags):
        return bits
    gaps = _write_block(_GAPS, _gaps(flags))
    return min(bits, gaps, key=len)


def _read_plane(reader: _Reader, count: int) -> Flags:
    # gaps: a byte for each one, and one more for each 255 zeros
    kind, data = _read_block(reader, count + count // _ESCAPE + 1)
    if kind == _BITS:
        if len(data) != -(-count // 8):
            raise _refuse(f"{-(-count // 8)} bytes long in a plane of {count}", len(data))
        return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)
    if kind != _GAPS:
        raise _refuse("bits or gaps", kind)
    steps = np.frombuffer(data, np.uint8).astype(np.int64)
    ends = np.cumsum(steps + (steps != _ESCAPE)) - 1
    places = ends[steps != _ESCAPE]
    if len(steps) and (steps[-1] == _ESCAPE or int(ends[-1]) >= count):
        raise _refuse(f"gaps within {count}", int(ends[-1]))
    flags = np.zeros(count, bool)
    flags[places] = True
    return flags


def _gaps(flags: Flags) -> bytes:
    """Return the numbers of zeros before each one; 255 stands for so many zeros and no one."""
    gaps = np.diff(np.flatnonzero(flags), prepend=-1) - 1
    escapes = gaps // _ESCAPE
    found = np.full(int((escapes + 1).sum()), _ESCAPE, np.uint8)
    found[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return found.tobytes()


def _write_block(kind: int, data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = coder.compress(data) + coder.flush()
    is_packed = len(packed) < len(data)
    body = packed if is_packed else data
    return _HEAD.pack(kind | is_packed << 7, len(body)) + body


def _read_block(reader: _Reader, most: int) -> tuple[int, bytes]:
    """Return the kind and the content of a block, of at most so many bytes."""
    kind, length = _HEAD.unpack(reader.take(_HEAD.size))
    body = reader.take(length)
    return kind & 127, inflate(body, most) if kind >> 7 else _bounded(body, most)


def _bounded(body: memoryview, most: int) -> bytes:
    if len(body) > most:
        raise _refuse(f"at most {most} bytes", len(body))
    return bytes(body)


def inflate(packed: bytes | memoryview, most: int) -> bytes:
    """Return what raw deflate data holds, which may be at most so many bytes.

    Raises:
        FormatError: it holds more, is cut, goes on behind its end, or is none.
    """
    coder = zlib.decompressobj(-15)
    try:
        data = coder.decompress(packed, most + 1)
    except zlib.error as error:
        raise _refuse("deflate data", str(error)) from error
    if len(data) > most or not coder.eof or coder.unused_data:
        raise _refuse(f"whole, and at most {most} bytes", f"{len(data)} bytes")
    return data


def _refuse(must: str, got: object) -> FormatError:
    return FormatError(describe("code", "a delta package", must, got))
