"""Weights in safetensors: checked headers, private maps, shards that fit their index."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.errors import FormatError
from deepseek.hub.bundle import hash_file
from deepseek.hub.safetensors import (
    INDEX,
    MAX_HEADER_BYTES,
    SINGLE,
    read_entries,
    read_header,
    read_tensors,
    write_tensors,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4, 2).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(7, dtype=torch.int32),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_read_here_and_by_the_library(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensor = (torch.randn(5, 3) * 4).to(dtype)
    written = write_tensors(tmp_path, [("a", tensor), ("b", tensor[1:3].clone())])
    assert written == {SINGLE: hash_file(tmp_path / SINGLE)}
    for read in (
        read_tensors(tmp_path, read_entries(tmp_path)),
        safetensors.torch.load_file(tmp_path / SINGLE),
    ):
        assert read["a"].dtype == dtype
        assert torch.equal(read["a"].view(torch.uint8), tensor.view(torch.uint8))
    with safetensors.safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_odd_tensors_survive(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors["transposed"] = torch.randn(4, 6).T
    tensors["part"] = torch.randn(10, 4)[2:5]
    write_tensors(tmp_path, tensors.items())
    read = read_tensors(tmp_path, read_entries(tmp_path))
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(read[name], value)


def test_training_in_place_never_reaches_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, [("a", torch.randn(512, 64)), ("b", torch.ones(8))])
    before = hash_file(tmp_path / SINGLE)
    tensors = read_tensors(tmp_path, read_entries(tmp_path))
    for tensor in tensors.values():
        tensor.mul_(2).add_(1)
    assert torch.equal(tensors["b"], torch.full((8,), 3.0))
    assert hash_file(tmp_path / SINGLE) == before
    again = read_tensors(tmp_path, read_entries(tmp_path))
    assert torch.equal(again["b"], torch.ones(8))


def test_mapped_tensors_outlive_the_replacement_of_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, [("a", torch.ones(4096))])
    tensors = read_tensors(tmp_path, read_entries(tmp_path))
    (tmp_path / SINGLE).unlink()
    write_tensors(tmp_path, [("a", torch.zeros(8))])
    assert torch.equal(tensors["a"], torch.ones(4096))


def test_shards_have_an_index_and_are_read_together(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.randn(10, 10) for index in range(6)}
    written = write_tensors(tmp_path, tensors.items(), max_shard_bytes=900)
    assert sorted(written) == sorted(
        [INDEX, *(f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3))]
    )
    assert written[INDEX] == hash_file(tmp_path / INDEX)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 6 * 400
    read = read_tensors(tmp_path, read_entries(tmp_path))
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_a_tensor_larger_than_a_shard_is_a_shard(tmp_path: Path) -> None:
    written = write_tensors(tmp_path, [("a", torch.ones(100)), ("b", torch.ones(1))], 10)
    assert len(written) == 3


def sharded(folder: Path) -> dict[str, object]:
    write_tensors(folder, [("a", torch.ones(8)), ("b", torch.ones(8))], max_shard_bytes=40)
    return json.loads((folder / INDEX).read_text())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"shard 'model-00002-of-00002\.safetensors'"):
        read_entries(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"a": "model-00001-of-00002.safetensors"}, "tensor 'b' .* in the index"),
        ({"c": "model-00001-of-00002.safetensors"}, "tensor 'c' .* got 'nowhere'"),
        ({"a": "model-00002-of-00002.safetensors"}, "tensor 'a'"),
        ({"a": "../x.safetensors"}, "a safetensors file name"),
        ({"a": "x.bin"}, "a safetensors file name"),
        ({"a": 5}, "a safetensors file name"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], match: str
) -> None:
    index = sharded(tmp_path)
    places = dict(index["weight_map"])  # type: ignore[call-overload]
    if match.startswith("tensor 'b'"):
        del places["b"]
        (tmp_path / "extra").mkdir()
        write_tensors(tmp_path / "extra", [("a", torch.ones(8)), ("b", torch.ones(8))])
        (tmp_path / "extra" / SINGLE).rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places | change}))
    with pytest.raises(FormatError, match=match):
        read_entries(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError, match="must be"):
        read_entries(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match="in one file"):
        read_entries(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"safetensors; got 'pytorch_model\.bin'.*convert"):
        read_entries(tmp_path)


def test_no_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="neither"):
        read_entries(tmp_path)


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(*offsets: int, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


WRONG: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": packed({}, length=1000),
    "header of exabytes": packed({}, length=1 << 62),
    "no JSON": packed(b"{nonsense"),
    "no table": packed([1]),
    "deep nesting": packed(b"[" * 100_000),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "name twice": packed(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "no fields": packed({"a": 1}),
    "unknown dtype": packed({"a": tensor(0, 8, dtype="F31")}, b"\0" * 8),
    "dtype of another type": packed({"a": tensor(0, 8, dtype=["F32"])}, b"\0" * 8),
    "no shape": packed({"a": tensor(0, 8, shape=None)}, b"\0" * 8),
    "negative shape": packed({"a": tensor(0, 8, shape=[-2])}, b"\0" * 8),
    "fractional shape": packed({"a": tensor(0, 8, shape=[2.0])}, b"\0" * 8),
    "true as a size": packed({"a": tensor(0, 4, shape=[True])}, b"\0" * 4),
    "huge shape": packed({"a": tensor(0, 8, shape=[1 << 62, 1 << 62])}, b"\0" * 8),
    "wrong length": packed({"a": tensor(0, 12)}, b"\0" * 12),
    "one offset": packed({"a": tensor(0)}, b"\0" * 8),
    "backwards": packed({"a": tensor(8, 0)}, b"\0" * 8),
    "beyond the file": packed({"a": tensor(0, 8)}, b"\0" * 4),
    "bytes left over": packed({"a": tensor(0, 8)}, b"\0" * 16),
    "gap": packed({"a": tensor(0, 8), "b": tensor(16, 24)}, b"\0" * 24),
    "gap at the start": packed({"a": tensor(8, 16)}, b"\0" * 16),
    "overlap": packed({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    (tmp_path / SINGLE).write_bytes(WRONG[case])
    with pytest.raises(FormatError, match=r"must be .*; got "):
        read_entries(tmp_path)


def test_an_oversized_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 1000)
    with pytest.raises(FormatError, match="header"):
        read_header(path)


def valid() -> bytes:
    torch.manual_seed(0)
    return safetensors.torch.save(some_tensors(), metadata={"format": "pt"})


VALID = valid()


def survives(folder: Path) -> None:
    try:
        entries = read_entries(folder)
    except FormatError:
        return
    try:
        tensors = read_tensors(folder, entries)
    except FormatError:
        return
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        name: entry.shape for name, entry in entries.items()
    }


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(st.integers(0, 420), st.integers(0, 255), max_size=4),
    cut=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID))),
)
def test_damage_never_does_worse_than_a_format_error(
    tmp_path: Path, changes: dict[int, int], cut: int
) -> None:
    data = bytearray(VALID)
    for place, byte in changes.items():
        data[place] = byte
    (tmp_path / SINGLE).write_bytes(data[:cut])
    survives(tmp_path)
    if cut < len(VALID) and not changes:
        with pytest.raises(FormatError):
            read_entries(tmp_path)
