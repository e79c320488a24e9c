"""Packed weights kept between runs, so that a model starts without packing them again.

A file of `$DEEPSEEK_HOME/packed` holds the weights of one model in one scheme as the kernels read
them, in the layout of safetensors. Its name says what it was made from: when that
changes the file is no longer found, and the next one takes its place; files of models that are gone
go with the next that is written. Anyone may delete these files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepseek.errors import FormatError, describe
from deepseek.hub.safetensors import MAX_HEADER_BYTES, TensorEntry, read_header
from deepseek.hub.store import safe_name, store_folder

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 64


def packed_folder() -> Path:
    """Return where the store keeps packed weights."""
    return store_folder() / "packed"


def packed_path(folder: Path, tensors: Mapping[str, TensorEntry], *, form: str) -> Path:
    """Return where the packed weights of a model folder belong, whether they are there or not.

    Args:
        folder: the model's.
        tensors: its entries; their files' sizes and times are part of the name.
        form: how they are packed: everything that the bytes depend on beside the weights.
    """
    place = folder.resolve()
    owner = f"{safe_name(folder.name)}-{_digest(str(place), form)[:12]}"
    files = sorted({entry.file for entry in tensors.values()})
    state = [(name, (place / name).stat()) for name in files]
    parts = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in state]
    return packed_folder() / f"{owner}-{_digest(*parts)[:16]}.safetensors"


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """One weight in a file of packed weights."""

    path: Path
    entry: TensorEntry

    def read_into(self, room: memoryview) -> None:
        """Fill a room in huge pages: decoding from a mapped file's small ones is an eighth slower.

        Raises:
            FormatError: the room has another length, or the file has been cut.
        """
        count = room.nbytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.entry.offset)
            # an unbuffered file may give less than it is asked for
            while count == self.entry.num_bytes and room and (got := file.readinto(room)):
                room = room[got:]
        if room or count != self.entry.num_bytes:
            must, got = f"{self.entry.num_bytes} bytes long", f"room for {count}, or a cut file"
            raise FormatError(describe("weight", str(self.path), must, got, "Delete the file"))


def read_packed(path: Path) -> dict[str, PackedWeight] | None:
    """Return packed weights, yet to be read, or None where there is no whole file of them."""
    if _metadata(path).get("name") != path.name:
        return None
    try:
        return {name: PackedWeight(path, entry) for name, entry in read_header(path).items()}
    except (FormatError, OSError) as error:
        _LOG.info("packed weights are made anew: %s", error)
        return None


def write_packed(path: Path, parts: Sequence[tuple[str, memoryview]], *, folder: Path) -> None:
    """Keep packed weights, in place of older ones of the same model and form.

    A place that cannot be written to and a full disk are no error: the next run packs again.

    Args:
        path: of `packed_path`.
        parts: bytes of each weight, each a multiple of 64 bytes long.
        folder: the model's.
    """
    fresh = path.with_name(f".{path.name}.new-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                file.write(_header(parts, {"name": path.name, "folder": str(folder.resolve())}))
                for _, data in parts:
                    file.write(data)
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
        _remove_stale(path)
    except OSError as error:
        _LOG.info("packed weights are not kept: %s", error)


def _remove_stale(newest: Path) -> None:
    """Remove older files of the newest one's model and form, and those whose model is gone."""
    owner = newest.name.rpartition("-")[0]
    for other in newest.parent.glob("*.safetensors"):
        is_older = other != newest and other.name.startswith(f"{owner}-")
        if is_older or not Path(_metadata(other).get("folder", "")).is_dir():
            other.unlink(missing_ok=True)


def _metadata(path: Path) -> dict[str, str]:
    """Return what a file says of itself; nothing where there is no such file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        return {str(key): str(value) for key, value in header["__metadata__"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _header(parts: Sequence[tuple[str, memoryview]], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name, data in parts:
        stop = start + data.nbytes
        header[name] = {"dtype": "U8", "shape": [data.nbytes], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
