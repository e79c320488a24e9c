"""One chunk of a file: how its bytes come from bytes of the old file and a payload."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek.errors import FormatError, describe
from deepseek.export.delta import planes
from deepseek.ops.grid import Bytes

CHUNK_BYTES = 1 << 20
"""Most bytes of the new file that one chunk gives, but for a copy."""
MAX_PAYLOAD_BYTES = CHUNK_BYTES + (1 << 16)
COPY, LITERAL = "copy", "literal"
_STORED, _LZMA = 0, 1
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": CHUNK_BYTES}]


class Difference(NamedTuple):
    """A way to write new bytes as a difference from as many old ones."""

    encode: Callable[[bytes, bytes], bytes]
    """Of the new and the old bytes."""
    decode: Callable[[bytes, bytes], bytes | memoryview]
    """Of the payload and the old bytes."""


def encode(new: bytes, old: bytes | None, kinds: Sequence[str]) -> tuple[str, bytes]:
    """Return the shortest way to write a chunk: its kind and its payload.

    Args:
        new: 1 to `CHUNK_BYTES` bytes.
        old: as many of the old file that stand for the same, or None where nothing does.
        kinds: differences that are tried.
    """
    if old == new:
        return COPY, b""
    tried: list[tuple[str, bytes]] = []
    if old is not None:
        fitting = (kind for kind in kinds if len(new) % _WIDTHS[kind] == 0)
        tried = [(kind, DIFFERENCES[kind].encode(new, old)) for kind in fitting]
    best = min(tried, key=lambda pair: len(pair[1]), default=None)
    if best is None or 2 * len(best[1]) > len(new):
        # a literal costs a second for each megabyte to write
        literal = LITERAL, write_literal(new)
        best = literal if best is None or len(literal[1]) < len(best[1]) else best
    return best


def decode(kind: str, payload: bytes, old: bytes | None, length: int) -> bytes | memoryview:
    """Return the bytes of a chunk that is no copy.

    Args:
        kind: `literal` or one of `DIFFERENCES`.
        payload: what `encode` gave.
        old: `length` bytes of the old file; None for a literal.
        length: of the chunk.

    Raises:
        FormatError: the payload is not one of such a chunk.
    """
    if kind == LITERAL:
        return read_literal(payload, length)
    if old is None or length % _WIDTHS[kind]:
        raise FormatError(describe("length", f"a chunk of {kind}", "whole numbers", length))
    return DIFFERENCES[kind].decode(payload, old)


def write_literal(data: bytes) -> bytes:
    """Return bytes as they are or behind LZMA, whichever is shorter."""
    packed = lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)
    return bytes([_LZMA]) + packed if len(packed) < len(data) else bytes([_STORED]) + data


def read_literal(payload: bytes, length: int) -> bytes:
    """Return the bytes of `write_literal`.

    Raises:
        FormatError: there are more or fewer of them than `length`, or the payload is none.
    """
    kind, body = payload[:1], payload[1:]
    if kind == bytes([_STORED]):
        data = body
    elif kind == bytes([_LZMA]):
        data = _inflate(body, length)
    else:
        raise FormatError(describe("literal", "a delta package", "stored or LZMA", kind))
    if len(data) != length:
        raise FormatError(describe("literal", "a delta package", f"{length} bytes", len(data)))
    return data


def _inflate(body: bytes, length: int) -> bytes:
    coder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        return coder.decompress(body, length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise FormatError(describe("literal", "a delta package", "LZMA", str(error))) from error


def _bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def _encode_bytes(new: bytes, old: bytes) -> bytes:
    return planes.encode((_bytes(new) - _bytes(old)).view(np.int8))


def _decode_bytes(payload: bytes, old: bytes) -> memoryview:
    return (planes.decode(payload, len(old)).view(np.uint8) + _bytes(old)).data


def _encode_nibbles(new: bytes, old: bytes) -> bytes:
    halves = (_bytes(new) & 15) - (_bytes(old) & 15), (_bytes(new) >> 4) - (_bytes(old) >> 4)
    steps = np.stack(halves, -1).reshape(-1)
    return planes.encode((((steps + 8) & 15) - 8).view(np.int8))


def _decode_nibbles(payload: bytes, old: bytes) -> memoryview:
    steps = planes.decode(payload, 2 * len(old)).view(np.uint8).reshape(-1, 2)
    low = (_bytes(old) + steps[:, 0]) & 15
    high = (_bytes(old) >> 4) + steps[:, 1]
    return (low | high << 4).data


def _encode_words(new: bytes, old: bytes, width: int) -> bytes:
    steps = np.frombuffer(new, f"<u{width}") - np.frombuffer(old, f"<u{width}")
    # zigzag: small steps of either sign have zeros in their high bytes
    signed = steps.view(f"<i{width}")
    folded: npt.NDArray[np.generic] = (signed << 1) ^ (signed >> (8 * width - 1))
    planes_of_bytes = folded.view(np.uint8).reshape(-1, width).T
    return write_literal(np.ascontiguousarray(planes_of_bytes).tobytes())


def _decode_words(payload: bytes, old: bytes, width: int) -> memoryview:
    data = _bytes(read_literal(payload, len(old))).reshape(width, -1).T
    folded = np.ascontiguousarray(data).view(f"<u{width}").reshape(-1)
    one = folded.dtype.type(1)
    steps = (folded >> one) ^ (0 - (folded & one))
    return (np.frombuffer(old, f"<u{width}") + steps).view(np.uint8).data


DIFFERENCES: Mapping[str, Difference] = {
    "bytes": Difference(_encode_bytes, _decode_bytes),
    "nibbles": Difference(_encode_nibbles, _decode_nibbles),
    "words2": Difference(
        lambda new, old: _encode_words(new, old, 2),
        lambda payload, old: _decode_words(payload, old, 2),
    ),
    "words4": Difference(
        lambda new, old: _encode_words(new, old, 4),
        lambda payload, old: _decode_words(payload, old, 4),
    ),
}
"""By the kind that a package names: of codes of eight and of four bits, of floats of two and of
four bytes."""
_WIDTHS = {"bytes": 1, "nibbles": 1, "words2": 2, "words4": 4}
