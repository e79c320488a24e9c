"""Reads and writes the weights of a Hugging Face folder: safetensors, in one file or in shards with
an index.

Headers are checked here, without torch, before the library maps a file: what is wrong is then one
FormatError that names the file and the tensor. Values are mapped privately (copy on write), so that
a model trained
in place never touches the file it came from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.errors import FormatError, describe
from deepseek.records import FileRecord

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{number:05}-of-{count:05}.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_SHARD_BYTES = 5_000_000_000

_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
_TORCH_NAMES: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
_PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pt",
    "model.pt",
    "consolidated.00.pth",
)
_CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What the header of a safetensors file says of one tensor."""

    file: str
    dtype: str
    """As in the file: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = dataclasses.field(default=0, compare=False)
    """Of its first byte in the file."""

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files that hold a folder's weights.

    Raises:
        FormatError: there are none, only pickles, or a shard that the index names is missing.
    """
    if (folder / INDEX).is_file():
        files = sorted(set(_read_index(folder).values()))
        for name in files:
            if not (folder / name).is_file():
                step = "Fetch the folder again"
                raise FormatError(
                    describe(f"shard {name!r}", str(folder / INDEX), "there", "no such file", step)
                )
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickle = next((name for name in _PICKLES if (folder / name).is_file()), None)
    if pickle is not None:
        step = (
            "A pickle can run any code when it is opened, so it is not read here; where you trust "
            "it, convert it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
        raise FormatError(describe("weights", str(folder), "safetensors", pickle, step))
    must = f"in {SINGLE} or in shards with {INDEX}"
    raise FormatError(
        describe("weights", str(folder), must, "neither", "Is the folder a whole model")
    )


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Return what the headers of a folder's weights say of each tensor, checked against the files
    and the index.

    Raises:
        FormatError: as `weight_files`, or a file is truncated, its header does not fit it, a tensor
            is in two files, or index and files disagree.
    """
    entries: dict[str, TensorEntry] = {}
    for name in weight_files(folder):
        for tensor, entry in read_header(folder / name).items():
            if tensor in entries:
                owner = str(folder / name)
                raise FormatError(
                    describe(
                        f"tensor {tensor!r}",
                        owner,
                        f"in one file, not also in {entries[tensor].file}",
                        name,
                    )
                )
            entries[tensor] = entry
    if (folder / INDEX).is_file():
        _check_index(folder, entries)
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the entries of one safetensors file, checked: known types, and data that covers the
    file exactly.

    Raises:
        FormatError: the file is truncated, its header is oversized or corrupt, or entries overlap
            or leave gaps.

    Source: https://huggingface.co/docs/safetensors/index#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
            must = (
                f"at most {max(0, min(size - 8, MAX_HEADER_BYTES))} bytes, the file having {size}"
            )
            step = "The file is cut off or no safetensors file: fetch it again"
            raise FormatError(describe("header", str(path), must, length, step))
        header = _parse(path, file.read(length))
    entries, spans = {}, []
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        entry, begin, end = _entry(path, name, fields)
        entries[name] = dataclasses.replace(entry, offset=8 + length + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            what = "overlaps the one before it" if begin < at else "leaves a gap before it"
            raise FormatError(
                describe(
                    f"data of tensor {name!r}", str(path), f"at byte {at}", f"{begin}: it {what}"
                )
            )
        at = end
    if at != size - 8 - length:
        step = "The file is cut off: fetch it again" if at > size - 8 - length else ""
        raise FormatError(
            describe("data", str(path), f"{at} bytes, as the header says", size - 8 - length, step)
        )
    return entries


def read_tensors(folder: Path, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder as private maps of its files; pages are read when they are
    touched.

    Args:
        folder: the model folder.
        entries: those of `read_entries` that are wanted.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for name in sorted({entry.file for entry in entries.values()}):
        try:
            with safe_open(str(folder / name), framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 (not a mapping)
                    if tensor in entries:
                        tensors[tensor] = file.get_tensor(tensor)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(
                describe("content", str(folder / name), "a safetensors file", str(error))
            ) from error
    return tensors


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, FileRecord]:
    """Write weights into a folder, in one file or in shards with an index, and return what was
    written.

    Tensors are taken one shard at a time, so that a stream of them needs no more memory than a
    shard.

    Args:
        folder: an existing folder without weights.
        tensors: names and values; a value on another device is copied shard by shard.
        max_shard_bytes: largest size of a file, unless one tensor alone is larger.
    """
    written: list[tuple[Path, FileRecord, list[str]]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes), start=1):
        path = folder / f".part-{number:05}"
        written.append((path, _write_file(path, shard), [name for name, _ in shard]))
        total += sum(tensor.numel() * tensor.element_size() for _, tensor in shard)
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return {SINGLE: written[0][1]}
    records, places = {}, {}
    for number, (path, record, names) in enumerate(written, start=1):
        final = SHARD.format(number=number, count=len(written))
        path.rename(folder / final)
        records[final] = record
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=2).encode() + b"\n"
    (folder / INDEX).write_bytes(text)
    records[INDEX] = FileRecord(sha256=hashlib.sha256(text).hexdigest(), size_bytes=len(text))
    return records


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> Iterable[list[tuple[str, torch.Tensor]]]:
    shard: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and size + num_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += num_bytes
    yield shard


def _write_file(path: Path, shard: list[tuple[str, torch.Tensor]]) -> FileRecord:
    """Write one file and hash it on the way; wide types come first, so all are aligned."""
    ordered = sorted(shard, key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        kind = _TORCH_NAMES[str(tensor.dtype).removeprefix("torch.")]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            size += file.write(piece)
        for _, tensor in ordered:
            data = _bytes(tensor)
            for start in range(0, len(data), _CHUNK_BYTES):
                piece = data[start : start + _CHUNK_BYTES]
                digest.update(piece)
                size += file.write(piece)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=size)


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _parse(path: Path, text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise FormatError(describe("name", f"the header of {path}", "given once", double))
        return table

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(describe("header", str(path), "JSON", str(error))) from error
    if not isinstance(header, dict):
        raise FormatError(describe("header", str(path), "a table of tensors", header))
    return header


def _entry(path: Path, name: str, fields: object) -> tuple[TensorEntry, int, int]:
    owner = f"{path}, tensor {name!r}"
    fields = fields if isinstance(fields, dict) else {}
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(kind, str) or kind not in _BITS:
        raise FormatError(describe("dtype", owner, f"one of {', '.join(_BITS)}", kind))
    if not _is_naturals(shape) or not isinstance(shape, list):
        raise FormatError(describe("shape", owner, "a list of sizes", shape))
    if not _is_naturals(offsets) or not isinstance(offsets, list) or len(offsets) != 2:
        raise FormatError(
            describe("data_offsets", owner, "where the data begins and ends", offsets)
        )
    num_bytes = math.prod(shape) * _BITS[kind] // 8
    if offsets[1] - offsets[0] != num_bytes:
        must = f"{num_bytes} bytes apart for {kind} {shape}"
        raise FormatError(describe("data_offsets", owner, must, offsets))
    return TensorEntry(path.name, kind, tuple(shape), num_bytes), offsets[0], offsets[1]


def _is_naturals(value: object) -> bool:
    # `type(...) is int` because True and False are no sizes
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(describe("content", str(path), "JSON", str(error))) from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise FormatError(
            describe("weight_map", str(path), "a table of tensor and file names", places)
        )
    for tensor, name in places.items():
        # a name with a folder in it could point anywhere
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or Path(name).name != name
        ):
            raise FormatError(
                describe(f"file of tensor {tensor!r}", str(path), "a safetensors file name", name)
            )
    return places


def _check_index(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    places = _read_index(folder)
    for tensor, name in places.items():
        if tensor not in entries or entries[tensor].file != name:
            got = entries[tensor].file if tensor in entries else "nowhere"
            raise FormatError(
                describe(f"tensor {tensor!r}", str(folder / INDEX), f"in {name}", got)
            )
    extra = [tensor for tensor in entries if tensor not in places]
    if extra:
        raise FormatError(
            describe(f"tensor {extra[0]!r}", str(folder / INDEX), "in the index", "missing there")
        )
