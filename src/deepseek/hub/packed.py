"""Packed weights kept between runs, so that a model starts without packing them again.

A file of `$DEEPSEEK_HOME/packed` holds the weights of one model in one scheme as the kernels read
them, in the layout of safetensors. Its name says what it was made from: when that
changes the file is no longer found, and the next one takes its place; files of models that are gone
go with the next that is written. The folder holds `$DEEPSEEK_PACKED_BYTES` at most, and what was
used last stays. Anyone may delete these files, also while they are read.

Every weight has a checksum: a file that a power cut or a bad disk left with other bytes is never
computed with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.hub.atomic import locked
from deepseek.hub.safetensors import MAX_HEADER_BYTES, TensorEntry, read_header
from deepseek.hub.store import safe_name, store_folder

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 64
_SUMMED_WORDS = 4096
"""Words of 8 bytes that are summed together for a checksum."""
BYTES_VARIABLE = "DEEPSEEK_PACKED_BYTES"
"""Environment variable: most bytes of the folder, a whole number; 0 keeps nothing."""
USUAL_BYTES = 8 * 2**30


def packed_folder() -> Path:
    """Return where the store keeps packed weights."""
    return store_folder() / "packed"


def packed_bound() -> int:
    """Return the most bytes that packed weights may take on the disk.

    Raises:
        ConfigError: `DEEPSEEK_PACKED_BYTES` is no whole number.
    """
    word = os.environ.get(BYTES_VARIABLE)
    if not word:
        return USUAL_BYTES
    if not word.isdecimal():
        must, step = "a whole number of bytes", "0 keeps nothing"
        raise ConfigError(describe(BYTES_VARIABLE, "the environment", must, word, step))
    return int(word)


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


class _Opened:
    """A file that stays readable when its name is gone; closed with the last weight of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """One weight in a file of packed weights."""

    file: _Opened
    entry: TensorEntry
    checksum: int

    def read_into(self, room: memoryview) -> None:
        """Fill a room in huge pages: decoding from a mapped file's small ones is an eighth slower.

        Raises:
            FormatError: the room has another length, or the file has been cut or has other bytes.
        """
        count, left, offset = room.nbytes, room, self.entry.offset
        # one call may give less than it is asked for
        while count == self.entry.num_bytes and left:
            got = os.preadv(self.file.handle, [left], offset)
            if not got:
                break
            left, offset = left[got:], offset + got
        step = "Delete the file"
        if left or count != self.entry.num_bytes:
            must, got = f"{self.entry.num_bytes} bytes long", f"room for {count}, or a cut file"
            raise FormatError(describe("weight", str(self.file.path), must, got, step))
        if _checksum(room) != self.checksum:
            must = "the bytes that were written"
            raise FormatError(describe("weight", str(self.file.path), must, "others", step))


def read_packed(path: Path) -> dict[str, PackedWeight] | None:
    """Return packed weights, yet to be read, or None where there is no whole file of them."""
    about = _metadata(path)
    if about.get("name") != path.name:
        if path.exists():
            _LOG.warning("packed weights are made anew: %s is no whole file of them", path)
        return None
    if "sums" not in about:  # as earlier releases wrote it
        return None
    try:
        file, sums = _Opened(path), json.loads(about["sums"])
        os.utime(path)  # what was used last is kept longest
        return {
            name: PackedWeight(file, entry, int(sums[name]))
            for name, entry in read_header(path).items()
        }
    except (FormatError, OSError, KeyError, TypeError, ValueError) as error:
        _LOG.warning("packed weights are made anew: %s", error)
        return None


def write_packed(path: Path, parts: Sequence[tuple[str, memoryview]], *, folder: Path) -> None:
    """Keep packed weights, in place of older ones of the same model and form, and of those that
    were not used for longest where the folder holds too many.

    A place that cannot be written to and a full disk are no error: the next run packs again.

    Args:
        path: of `packed_path`.
        parts: bytes of each weight, each a multiple of 64 bytes long.
        folder: the model's.
    """
    bound = packed_bound()
    if sum(data.nbytes for _, data in parts) > bound:
        _LOG.info("packed weights are not kept: they are more than %d bytes", bound)
        return
    about = {"name": path.name, "folder": str(folder.resolve())}
    sums = {name: _checksum(data) for name, data in parts}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _fresh_file(path) as file:
            file.write(_header(parts, about | {"sums": json.dumps(sums)}))
            for _, data in parts:
                file.write(data)
            file.flush()
            with locked(path.parent):
                os.replace(file.name, path)
                _remove_stale(path)
                _remove_oldest(path, bound)
    except OSError as error:
        _LOG.warning("packed weights are not kept: %s", error)


@dataclasses.dataclass(frozen=True)
class KeptWeights:
    """A file of packed weights."""

    path: Path
    folder: str
    """Of the model."""
    size_bytes: int
    used_s: float
    """When it was written or read last, in seconds since 1970."""


def kept_weights() -> list[KeptWeights]:
    """Return all files of packed weights in the store, what was used last first."""
    found: list[KeptWeights] = []
    for path in packed_folder().glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            stat, about = path.stat(), _metadata(path)
            found.append(
                KeptWeights(path, about.get("folder", ""), stat.st_size, stat.st_mtime_ns / 1e9)
            )
    return sorted(found, key=lambda each: each.used_s, reverse=True)


@contextlib.contextmanager
def _fresh_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a hidden file beside a place, under a lock: what is not locked is of a process that
    died, and goes."""
    _remove_left_over(path.parent)
    fresh = path.with_name(f".{path.name}.new-{os.urandom(4).hex()}")
    try:
        with fresh.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
    finally:
        fresh.unlink(missing_ok=True)


def _remove_left_over(folder: Path) -> None:
    for path in folder.glob(".*.safetensors.new-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _remove_stale(newest: Path) -> None:
    """Remove older files of the newest one's model and form, and those whose model is gone."""
    owner = newest.name.rpartition("-")[0]
    for other in newest.parent.glob("*.safetensors"):
        is_older = other != newest and other.name.startswith(f"{owner}-")
        if is_older or not Path(_metadata(other).get("folder", "")).is_dir():
            other.unlink(missing_ok=True)


def _remove_oldest(newest: Path, bound: int) -> None:
    """Remove files, those unused for longest first, until all take no more than the bound."""
    stats = {path: path.stat() for path in newest.parent.glob("*.safetensors")}
    total = sum(stat.st_size for stat in stats.values())
    for path in sorted(stats, key=lambda path: stats[path].st_mtime_ns):
        if total <= bound:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= stats[path].st_size


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


def _checksum(data: memoryview) -> int:
    """Return a checksum of bytes, a multiple of 8 of them, at nearly the speed of memory.

    It is the CRC-32 of sums of neighbouring words: any changed word and any displaced block changes
    it.
    """
    words = np.frombuffer(data, np.uint64)
    whole = len(words) // _SUMMED_WORDS * _SUMMED_WORDS
    sums = np.add.reduce(words[:whole].reshape(-1, _SUMMED_WORDS), axis=1)
    return zlib.crc32(words[whole:].tobytes(), zlib.crc32(sums.tobytes()))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
