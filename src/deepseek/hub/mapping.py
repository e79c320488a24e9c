"""The weights of a folder as places in mapped files, for readers that need no torch."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deepseek.errors import FormatError, describe
from deepseek.hub.safetensors import TensorEntry

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True, eq=False)
class MappedTensor:
    """A tensor in a mapped file: its address, and how to read it."""

    address: int
    dtype: str
    """float32, bfloat16 or float16."""
    shape: tuple[int, ...]
    stride_bytes: int
    """From one entry of the first dimension to the next."""
    file: MappedFile
    offset: int
    num_bytes: int

    def release(self) -> None:
        """Give its pages back to the system; they come again if they are read again."""
        self.file.release(self.offset, self.num_bytes)


class MappedFile:
    """A file mapped for reading, open as long as a tensor of it is held."""

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            FormatError: it cannot be mapped.
        """
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FormatError(describe("file", str(path), "readable", str(error))) from error
        self.address = np.frombuffer(self._map, np.uint8).__array_interface__["data"][0]

    def release(self, offset: int, num_bytes: int) -> None:
        """Give whole pages of a range back to the system."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def map_tensors(folder: Path, entries: Mapping[str, TensorEntry]) -> dict[str, MappedTensor]:
    """Return a folder's tensors in place; nothing is read yet.

    Args:
        folder: the model folder.
        entries: what `read_entries` gave.

    Raises:
        FormatError: a file cannot be mapped, or a tensor is of a type the engine does not read.
    """
    files: dict[str, MappedFile] = {}
    tensors = {}
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            must = f"one of {', '.join(_DTYPES)}"
            raise FormatError(describe(f"dtype of {name!r}", str(folder), must, entry.dtype))
        if entry.file not in files:
            files[entry.file] = MappedFile(folder / entry.file)
        file = files[entry.file]
        rows = entry.shape[0] if entry.shape else 1
        tensors[name] = MappedTensor(
            address=file.address + entry.offset,
            dtype=_DTYPES[entry.dtype],
            shape=entry.shape,
            stride_bytes=entry.num_bytes // max(rows, 1),
            file=file,
            offset=entry.offset,
            num_bytes=entry.num_bytes,
        )
    return tensors
