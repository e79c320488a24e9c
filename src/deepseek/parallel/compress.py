"""Gradients in few bits: two of every four neighbours, in one byte each.

Of every four neighbours the two of largest magnitude are kept, each with its place in two bits;
the others are what the caller remembers as its error. A block of 256 values becomes one row of
bytes that can be read by itself:

    float8     128 bytes e4m3, 32 bytes places, 1 byte exponent   161 bytes, 5.03 bits a value
    bfloat16   256 bytes bfloat16, 32 bytes places                288 bytes, 9 bits a value

The scale of a float8 block is a power of two, the one that puts its largest value just below the
largest of e4m3. So scaling rounds nothing, and what is lost, value minus what is read back, is
itself a float32: error feedback on top of this loses nothing at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Values of a row of bytes, and of a scale."""

Values = Literal["float8", "bfloat16"]

_CHUNK = 1024
"""Blocks that are worked on at once, so that what is between stays in the cache."""
_GROUPS = BLOCK // 4
_NUM_BYTES = {"float8": BLOCK // 2, "bfloat16": BLOCK}
_CUT = 0x7FFFFFF8
"""Bits of a magnitude that choose; the lowest three hold the sign and the place meanwhile."""
_INFINITY = 0x7F800000
_LEAST, _NOT_FINITE = 9, 255
"""Exponents of a block: the smallest one, and the one that says that it is not finite."""
_TO_TOP = 127 + 127 + 8
"""Of e4m3 the largest exponent is 8; float32 counts exponents from 127."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """Packs float32 values, and reads them back."""

    values: Values

    @property
    def row_bytes(self) -> int:
        """Bytes of a block of 256 values."""
        return _NUM_BYTES[self.values] + _GROUPS // 2 + (self.values == "float8")

    def encode(self, values: Tensor) -> Tensor:
        """Return values as bytes [blocks, row_bytes].

        A value that is not finite is read back as such; in float8 all that its block keeps is, and
        3.08e38 counts as infinity.

        Args:
            values: float32 [count], contiguous; the last block is filled up with zeros.
        """
        blocks = -(-values.numel() // BLOCK)
        packed = torch.empty(blocks, self.row_bytes, dtype=torch.uint8, device=values.device)
        for first, last in _chunks(blocks):
            part = values[first * BLOCK : last * BLOCK]
            if part.numel() < (last - first) * BLOCK:
                part = pad(part, (0, (last - first) * BLOCK - part.numel()))
            self._encode(part.view(-1, _GROUPS, 4), packed[first:last])
        return packed

    def decode(self, packed: Tensor, out: Tensor) -> Tensor:
        """Read values back into `out`, and return it.

        Args:
            packed: uint8 [blocks, row_bytes].
            out: float32 [count], contiguous, of as many blocks.
        """
        for first, last in _chunks(len(packed)):
            part = out[first * BLOCK : last * BLOCK]
            part.copy_(self._decode(packed[first:last])[: part.numel()])
        return out

    def _encode(self, groups: Tensor, packed: Tensor) -> None:
        """Fill rows of bytes from groups [blocks, 64, 4]."""
        kept = _two_largest(groups)
        num_bytes = _NUM_BYTES[self.values]
        numbers = ((kept & _CUT) | ((kept & 4) << 29)).view(torch.float32)
        if self.values == "float8":
            exponents = _exponents(kept[:, 0])
            # read as float32, these bits are two to the power that brings the largest to 8
            numbers *= ((_TO_TOP - exponents) << 23).view(torch.float32)[:, None, None]
            packed[:, -1] = exponents
            few = numbers.to(torch.float8_e4m3fn)
        else:
            few = numbers.to(torch.bfloat16)
        packed[:, :num_bytes] = few.flatten(1).view(torch.uint8)
        places = (kept[:, 0] & 3) | ((kept[:, 1] & 3) << 2)
        half = _GROUPS // 2
        packed[:, num_bytes : num_bytes + half] = places[:, :half] | (places[:, half:] << 4)

    def _decode(self, packed: Tensor) -> Tensor:
        """Return the values [blocks * 256] of rows of bytes."""
        num_bytes, half = _NUM_BYTES[self.values], _GROUPS // 2
        few = packed[:, :num_bytes]
        if self.values == "float8":
            table = torch.arange(256, dtype=torch.uint8, device=packed.device)
            table = table.view(torch.float8_e4m3fn).float()
            numbers = table.index_select(0, few.flatten().int()).view(-1, 2, _GROUPS)
            numbers *= _scales(packed[:, -1].int())[:, None, None]
        else:
            numbers = few.contiguous().view(torch.bfloat16).float().view(-1, 2, _GROUPS)
        pairs = packed[:, num_bytes : num_bytes + half].long()
        places = torch.cat([pairs & 15, pairs >> 4], 1)
        both = torch.stack([places & 3, places >> 2], 1)
        read = torch.zeros(len(packed), 4, _GROUPS, device=packed.device)
        return read.scatter_(1, both, numbers).transpose(1, 2).reshape(-1)


def _chunks(blocks: int) -> Iterator[tuple[int, int]]:
    for first in range(0, blocks, _CHUNK):
        yield first, min(first + _CHUNK, blocks)


def _two_largest(groups: Tensor) -> Tensor:
    """Return the two of largest magnitude of each four, [blocks, 2, 64], as int32: the magnitude's
    bits but the lowest three, then the sign, then the place.

    Magnitudes of floats are ordered like their bits, so the two are found by minima and maxima of
    whole rows; nothing is sorted or gathered.
    """
    words = groups.view(torch.int32).transpose(1, 2).contiguous()
    places = torch.arange(4, dtype=torch.int32, device=words.device)[:, None]
    signs = (words >> 29).bitwise_and_(4)
    a, b, c, d = words.bitwise_and_(_CUT).bitwise_or_(signs).bitwise_or_(places).unbind(1)
    high, other = torch.maximum(a, b), torch.maximum(c, d)
    low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.maximum(torch.minimum(high, other), low)
    return torch.stack([torch.maximum(high, other), second], 1)


def _exponents(largest: Tensor) -> Tensor:
    """Return the exponent of each block [blocks] from the larger ones of its groups [blocks, 64].

    It is one more where e4m3, whose largest value is 1.75 times a power of two, would round up
    past its end: from 1.8125 on.
    """
    most = largest.amax(1).clamp_(max=_INFINITY)
    return ((most + 0x180000) >> 23).clamp_(min=_LEAST)


def _scales(exponents: Tensor) -> Tensor:
    """Return what a block's numbers are multiplied by when they are read."""
    scales = ((exponents - 8) << 23).view(torch.float32)
    return torch.where(exponents == _NOT_FINITE, torch.nan, scales)


def read_back(values: Tensor, kind: Values) -> Tensor:
    """Return what `Codec` reads back, computed plainly: the specification.

    Of magnitudes that differ by less than two to the -20th the negative one, then the later one
    is kept.

    Args:
        values: float32 [count].
        kind: of the kept values.
    """
    count = values.numel()
    filled = pad(values, (0, -count % BLOCK)).view(-1, _GROUPS, 4)
    cut = (filled.view(torch.int32) & -8).view(torch.float32)
    order = torch.arange(3, -1, -1).expand_as(cut)
    for key in (cut.signbit().int(), cut.view(torch.int32) & 0x7FFFFFFF):
        order = order.gather(2, key.gather(2, order).argsort(dim=2, descending=True, stable=True))
    places = order[..., :2]
    read = cut.gather(2, places)
    if kind == "bfloat16":
        read = read.bfloat16().float()
    else:
        largest = read.abs().amax((1, 2), keepdim=True)
        exponent = torch.frexp(largest.double() / 0.90625).exponent - 9
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=_LEAST - 135))
        read = (read / scale).to(torch.float8_e4m3fn).float() * scale
        read = torch.where(largest < 1.8125 * 2.0**127, read, torch.nan)
    return torch.zeros_like(cut).scatter(2, places, read).flatten()[:count]
