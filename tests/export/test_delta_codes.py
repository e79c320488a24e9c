"""The codes of chunks: what goes in comes out, and rubbish is one error and no memory."""

from __future__ import annotations

import contextlib
import lzma
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import FormatError
from deepseek.export.delta import chunks, planes

BYTES = st.binary(min_size=1, max_size=400)
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, count: int, share: float) -> planes.Signed:
    random = np.random.default_rng(seed)
    values = random.geometric(0.7, count) * random.choice([-1, 1], count)
    return np.where(random.random(count) < share, values.clip(-128, 127), 0).astype(np.int8)


@given(SEEDS, st.integers(0, 3000), st.sampled_from([0.0, 0.001, 0.05, 0.3, 0.8, 1.0]))
def test_differences_come_back(seed: int, count: int, share: float) -> None:
    values = drawn(seed, count, share)
    assert np.array_equal(planes.decode(planes.encode(values), count), values)


@given(st.binary(max_size=300))
def test_any_differences_come_back(data: bytes) -> None:
    values = np.frombuffer(data, np.int8)
    assert np.array_equal(planes.decode(planes.encode(values), len(values)), values)


@pytest.mark.parametrize("share", [0.004, 0.02, 0.1, 0.25, 0.5, 0.8])
def test_differences_are_near_their_entropy(share: float) -> None:
    values = drawn(0, 1 << 19, share)
    assert len(planes.encode(values)) <= 1.05 * planes.entropy_bytes(values) + 100


def test_entropy_is_shannons() -> None:
    assert planes.entropy_bytes(np.zeros(80, np.int8)) == 0
    assert planes.entropy_bytes(np.arange(256).astype(np.uint8)) == pytest.approx(256)


@given(BYTES, SEEDS, st.sampled_from([*chunks.DIFFERENCES]), st.booleans())
def test_chunks_come_back(new: bytes, seed: int, kind: str, near: bool) -> None:
    random = np.random.default_rng(seed)
    old = random.bytes(len(new))
    if near:
        steps = random.integers(0, 2, len(new), np.uint8)
        old = (np.frombuffer(new, np.uint8) - steps).tobytes()
    found, payload = chunks.encode(new, old, [kind])
    assert found != chunks.COPY or new == old
    if found != chunks.COPY:
        source = None if found == chunks.LITERAL else old
        assert bytes(chunks.decode(found, payload, source, len(new))) == new


@pytest.mark.parametrize("kind", [*chunks.DIFFERENCES])
def test_each_kind_is_shorter_where_it_fits(kind: str) -> None:
    random = np.random.default_rng(0)
    old = random.bytes(1 << 16)
    width = {"words2": "<u2", "words4": "<u4"}.get(kind, "u1")
    if kind == "nibbles":
        # a step of the low half that does not carry
        new = bytes(each ^ (random.random() < 0.05) for each in old)
    else:
        steps = random.integers(-2, 3, len(old) // np.dtype(width).itemsize).astype(width)
        new = (np.frombuffer(old, width) + steps).tobytes()
    found, payload = chunks.encode(new, old, [kind])
    assert found == kind and len(payload) < 0.5 * len(new)
    assert bytes(chunks.decode(found, payload, old, len(new))) == new


@settings(max_examples=300)
@given(st.sampled_from([chunks.LITERAL, *chunks.DIFFERENCES]), st.binary(max_size=200), BYTES)
def test_rubbish_is_one_error(kind: str, payload: bytes, old: bytes) -> None:
    source = None if kind == chunks.LITERAL else old
    with contextlib.suppress(FormatError):
        assert len(chunks.decode(kind, payload, source, len(old))) == len(old)


@settings(max_examples=200)
@given(SEEDS, st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_code_is_one_error_or_other_values(seed: int, place: int, byte: int) -> None:
    values = drawn(seed, 2000, 0.2)
    code = bytearray(planes.encode(values))
    code[place % len(code)] = byte
    with contextlib.suppress(FormatError):
        assert len(planes.decode(bytes(code), 2000)) == 2000


def test_what_unpacks_to_more_than_it_says_needs_no_memory() -> None:
    zeros = bytes(16 << 20)
    packed = lzma.compress(zeros, lzma.FORMAT_RAW, filters=chunks._FILTERS)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = coder.compress(zeros) + coder.flush()
    code = planes._HEAD.pack(planes._BITS | 128, len(body)) + body
    del zeros
    tracemalloc.start()
    with pytest.raises(FormatError):
        chunks.decode(chunks.LITERAL, b"\1" + packed, None, 1000)
    with pytest.raises(FormatError):
        planes.decode(code, 1000)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20  # LZMA's dictionary is one
    tracemalloc.stop()
