"""The container: stored types expand as the format says, and nothing in a file is believed."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.errors import FormatError
from deepseek.hub.gguf import STORED_TYPES, GgufFile, read_gguf
from tests.hub.tiny import entry, finish, pair, raw_gguf, text

Kind = gguf.GGMLQuantizationType
WRITABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_TYPES = ["Q4_K", "Q5_K", "Q6_K"]


def write_blocks(path: Path, kind: str, data: npt.NDArray[np.generic]) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", data, raw_dtype=None if kind == "F32" else Kind[kind])
    finish(writer)
    return read_gguf(path)


@pytest.mark.parametrize("kind", WRITABLE)
@pytest.mark.parametrize("shape", [(3, 64), (1, 32), (33, 96), (2, 3, 32)])
def test_stored_types_expand_as_the_reference_does(
    tmp_path: Path, kind: str, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    data = gguf.quants.quantize(values, Kind[kind])
    file = write_blocks(tmp_path / "a.gguf", kind, data)
    assert file.tensors["a"].shape == shape
    np.testing.assert_array_equal(file.values("a"), gguf.quants.dequantize(data, Kind[kind]))
    error = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 3e-2}.get(kind, 0.4)
    assert np.abs(file.values("a") - values).max() <= error


def scalar_q4_k(block: bytes) -> list[float]:
    """Expand one block of Q4_K the way the format describes it, number by number."""
    d, dmin = struct.unpack("<ee", block[:4])
    scales, quants = block[4:16], block[16:144]
    values = []
    for group in range(8):
        scale, low = six_bits(scales, group)
        for index in range(32):
            byte = quants[group // 2 * 32 + index]
            value = byte & 15 if group % 2 == 0 else byte >> 4
            values.append(np.float32(d) * scale * value - np.float32(dmin) * low)
    return values


def scalar_q5_k(block: bytes) -> list[float]:
    """Expand one block of Q5_K: Q4_K with a fifth bit elsewhere."""
    d, dmin = struct.unpack("<ee", block[:4])
    scales, highs, quants = block[4:16], block[16:48], block[48:176]
    values = []
    for group in range(8):
        scale, low = six_bits(scales, group)
        for index in range(32):
            byte = quants[group // 2 * 32 + index]
            value = (byte & 15 if group % 2 == 0 else byte >> 4) | (highs[index] >> group & 1) << 4
            values.append(np.float32(d) * scale * value - np.float32(dmin) * low)
    return values


def scalar_q6_k(block: bytes) -> list[float]:
    """Expand one block of Q6_K: four low bits, two high bits, sixteen signed scales."""
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:210])
    values = [0.0] * 256
    for half in range(2):
        for index in range(32):
            bits = high[half * 32 + index]
            for quarter in range(4):
                byte = low[half * 64 + index + 32 * (quarter % 2)]
                nibble = byte & 15 if quarter < 2 else byte >> 4
                value = (nibble | (bits >> 2 * quarter & 3) << 4) - 32
                place = half * 128 + quarter * 32 + index
                values[place] = np.float32(d) * scales[place // 16] * value
    return values


def six_bits(scales: bytes, group: int) -> tuple[int, int]:
    """Return scale and minimum of a group. Source: get_scale_min_k4 of ggml-quants.c."""
    if group < 4:
        return scales[group] & 63, scales[group + 4] & 63
    low = scales[group + 4]
    return (low & 15) | (scales[group - 4] >> 6) << 4, (low >> 4) | (scales[group] >> 6) << 4


@pytest.mark.parametrize("kind", K_TYPES)
def test_k_types_expand_as_the_format_describes(tmp_path: Path, kind: str) -> None:
    stored = next(item for item in STORED_TYPES.values() if item.name == kind)
    generator = np.random.default_rng(1)
    rows, columns = 35, 3
    blocks = generator.integers(0, 256, (rows * columns, stored.block_bytes), dtype=np.uint8)
    scale = generator.uniform(0.001, 0.1, (rows * columns, 2)).astype("<f2").view(np.uint8)
    if kind == "Q6_K":
        blocks[:, 208:210] = scale[:, :2]
    else:
        blocks[:, :4] = scale
    file = write_blocks(tmp_path / "a.gguf", kind, blocks.reshape(rows, -1))
    expand = {"Q4_K": scalar_q4_k, "Q5_K": scalar_q5_k, "Q6_K": scalar_q6_k}[kind]
    expected = np.array([expand(block.tobytes()) for block in blocks], np.float32)
    assert file.tensors["a"].shape == (rows, columns * 256)
    np.testing.assert_allclose(file.values("a"), expected.reshape(rows, -1), rtol=1e-6, atol=1e-5)
    reference = gguf.quants.dequantize(blocks.reshape(rows, -1), Kind[kind])
    np.testing.assert_array_equal(file.values("a"), reference)


def test_long_tensors_are_read_in_pieces_that_fit_together(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=(45, 32 * 800)).astype(np.float32)
    data = gguf.quants.quantize(values, Kind.Q8_0)
    file = write_blocks(tmp_path / "a.gguf", "Q8_0", data)
    np.testing.assert_array_equal(file.values("a"), gguf.quants.dequantize(data, Kind.Q8_0))


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    codes = [
        (0, "<B", 200),
        (1, "<b", -5),
        (2, "<H", 60000),
        (3, "<h", -3),
        (4, "<I", 1 << 31),
        (5, "<i", -7),
        (10, "<Q", 1 << 63),
        (11, "<q", -(1 << 40)),
        (12, "<d", 0.1),
        (6, "<f", 1e-5),
        (7, "<?", True),
    ]
    pairs = [pair(f"k{code}", code, struct.pack(form, value)) for code, form, value in codes]
    pairs += [
        pair(f"a{code}", 9, struct.pack("<IQ" + form[1], code, 1, value))
        for code, form, value in codes
    ]
    pairs.append(pair("s", 8, text("héllo 世界")))
    pairs.append(pair("as", 9, struct.pack("<IQ", 8, 2) + text("x") + text("")))
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_gguf(pairs, []))
    metadata = read_gguf(path).metadata
    for code, _, value in codes:
        assert metadata[f"k{code}"] == value, code
        assert metadata[f"a{code}"].tolist()[0] == pytest.approx(value), code
    assert metadata["s"] == "héllo 世界"
    assert metadata["as"] == ["x", ""]


def test_version_2_and_another_alignment_are_read(tmp_path: Path) -> None:
    values = np.arange(4, dtype="<f4").tobytes()
    head = raw_gguf(
        [pair("general.alignment", 4, struct.pack("<I", 64))], [entry("a", [4])], version=2
    )
    head += b"\0" * (-len(head) % 64)
    path = tmp_path / "a.gguf"
    path.write_bytes(head + values)
    assert read_gguf(path).values("a").tolist() == [0, 1, 2, 3]


DATA = b"\0" * 64
HUGE = struct.pack("<Q", 1 << 62)
WRONG: dict[str, bytes] = {
    "empty": b"",
    "short": b"GGUF",
    "magic": raw_gguf([], [], DATA, magic=b"GGML"),
    "version 1": raw_gguf([], [], DATA, version=1),
    "version 9": raw_gguf([], [], DATA, version=9),
    "big-endian": raw_gguf([], [], DATA, version=3 << 24),
    "too many tensors": raw_gguf([], [], DATA, num_entries=1 << 60),
    "too many values": raw_gguf([], [], DATA, num_pairs=1 << 60),
    "one tensor too many": raw_gguf([], [entry("a", [4])], DATA, num_entries=2),
    "one value too many": raw_gguf([pair("a", 0, b"\1")], [], DATA, num_pairs=2),
    "long key": raw_gguf([HUGE], [], DATA),
    "long text": raw_gguf([text("a") + struct.pack("<I", 8) + HUGE], [], DATA),
    "not UTF-8": raw_gguf([pair("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], [], DATA),
    "unknown value type": raw_gguf([pair("a", 13, b"\0" * 8)], [], DATA),
    "nested array": raw_gguf([pair("a", 9, struct.pack("<IQ", 9, 1) + b"\0" * 40)], [], DATA),
    "long array": raw_gguf([pair("a", 9, struct.pack("<IQ", 0, 1 << 50))], [], DATA),
    "long array of text": raw_gguf([pair("a", 9, struct.pack("<IQ", 8, 1 << 50))], [], DATA),
    "key twice": raw_gguf([pair("a", 0, b"\1")] * 2, [], DATA),
    "tensor twice": raw_gguf([], [entry("a", [4]), entry("a", [4], offset=32)], DATA),
    "alignment 0": raw_gguf([pair("general.alignment", 4, b"\0" * 4)], [], DATA),
    "alignment 48": raw_gguf([pair("general.alignment", 4, struct.pack("<I", 48))], [], DATA),
    "alignment text": raw_gguf([pair("general.alignment", 8, text("32"))], [], DATA),
    "huge alignment": raw_gguf([pair("general.alignment", 4, struct.pack("<I", 1 << 31))], []),
    "no dimension": raw_gguf([], [entry("a", [])], DATA),
    "many dimensions": raw_gguf([], [entry("a", [1] * 5)], DATA),
    "dimension 0": raw_gguf([], [entry("a", [4, 0])], DATA),
    "huge dimensions": raw_gguf([], [entry("a", [1 << 40, 1 << 40])], DATA),
    "part of a block": raw_gguf([], [entry("a", [33], code=8)], DATA),
    "refused type": raw_gguf([], [entry("a", [256], code=10)], DATA * 4),
    "unknown type": raw_gguf([], [entry("a", [32], code=4242)], DATA),
    "crooked offset": raw_gguf([], [entry("a", [4], offset=4)], DATA),
    "offset beyond": raw_gguf([], [entry("a", [4], offset=64)], DATA),
    "offset far beyond": raw_gguf([], [entry("a", [4], offset=(1 << 64) - 32)], DATA),
    "data cut off": raw_gguf([], [entry("a", [17])], DATA),
    "overlapping": raw_gguf([], [entry("a", [16]), entry("b", [8], offset=32)], DATA),
    "in pieces": raw_gguf([pair("split.count", 2, struct.pack("<H", 3))], [], DATA),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(WRONG[case])
    with pytest.raises(FormatError, match=r"must be .*; got "):
        read_gguf(path)


def test_refused_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(WRONG["refused type"])
    with pytest.raises(FormatError, match=r"one of F32, .*Q6_K, BF16; got 'Q2_K'"):
        read_gguf(path)


def test_no_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(FormatError, match="a GGUF file"):
            read_gguf(path)


VALID = raw_gguf(
    [
        pair("general.architecture", 8, text("llama")),
        pair("llama.block_count", 4, struct.pack("<I", 1)),
        pair("scores", 9, struct.pack("<IQ", 6, 3) + struct.pack("<3f", 1, 2, 3)),
        pair("tokens", 9, struct.pack("<IQ", 8, 2) + text("hello") + text("世界")),
    ],
    [entry("a", [8]), entry("b", [32, 2], code=8, offset=32)],
    bytes(range(200)),
)


def survives(path: Path) -> None:
    """Read a file that may be damaged: it is refused, or whole enough to be read to the end."""
    try:
        file = read_gguf(path)
    except FormatError:
        return
    for name, tensor in file.tensors.items():
        with np.errstate(all="ignore"):
            assert file.values(name).shape == tensor.shape
            assert file.values(name).size == math.prod(tensor.shape)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(st.integers(0, len(VALID) - 1), st.integers(0, 255), max_size=6))
def test_changed_bytes_never_do_worse_than_a_format_error(
    tmp_path: Path, changes: dict[int, int]
) -> None:
    data = bytearray(VALID)
    for place, byte in changes.items():
        data[place] = byte
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    survives(path)


@pytest.mark.parametrize("place", range(0, len(VALID), 3))
def test_a_cut_file_is_refused(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(VALID[:place])
    end = len(VALID) - (200 - 32 - 68)
    if place < end:
        with pytest.raises(FormatError):
            read_gguf(path)
    else:
        survives(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tail=st.binary(max_size=200), counts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_noise_behind_the_magic_is_refused_or_read(
    tmp_path: Path, tail: bytes, counts: tuple[int, int]
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)
    survives(path)
