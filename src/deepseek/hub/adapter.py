"""Reads a low-rank adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Files come from strangers: sizes are checked before anything is allocated, nothing is unpickled, no
pattern of a file is run as a regular expression, and a setting that would change the mathematics in
a way that is not computed here is refused. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deepseek.errors import CapacityError, FormatError, describe
from deepseek.hub.adapter_config import AdapterConfig, read_adapter_config
from deepseek.hub.safetensors import TensorEntry, read_header
from deepseek.ops.low_rank import MAX_RANK, LowRankUpdate

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000

_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<part>[AB])\.weight")
_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter in memory, in float32."""

    updates: Mapping[str, LowRankUpdate]
    """By the name of the weight that each stands beside."""
    fingerprint: str
    """SHA-256 of names, scales and values: two adapters of one fingerprint compute the same."""
    base: str | None
    """What its files say that it was trained on."""

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(update.rank for update in self.updates.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return sum(each.down.nbytes + each.up.nbytes for each in self.updates.values())


def read_adapter(folder: Path, *, max_bytes: int) -> Adapter:
    """Return the adapter of a folder that PEFT or `deepseek adapt` has written.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        max_bytes: most bytes of its values in float32.

    Raises:
        FormatError: a file is missing, truncated, corrupt or a pickle, values are not finite, or
            the adapter is of a kind that is not computed here.
        CapacityError: it is larger.
    """
    config = read_adapter_config(folder / CONFIG, _read_config(folder))
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = next((each.name for each in folder.glob("adapter_model.bin")), None)
        step = "A pickle can run any code when it is opened" if pickle else "Is it an adapter"
        raise FormatError(describe("weights", str(folder), WEIGHTS, pickle or "no such file", step))
    entries = read_header(path)
    num_bytes = sum(4 * entry.num_elements for entry in entries.values())
    if num_bytes > max_bytes:
        must = f"at most {max_bytes} bytes in float32"
        raise CapacityError(describe("values", str(path), must, num_bytes, "Drop another adapter"))
    pairs = _pairs(path, entries, config)
    tensors = _read(path, entries)
    updates = {
        f"{module}.weight": LowRankUpdate(tensors[down], tensors[up], config.scale_of(module))
        for module, (down, up) in sorted(pairs.items())
    }
    return Adapter(updates, _fingerprint(updates), config.base)


def _read_config(folder: Path) -> object:
    path = folder / CONFIG
    if not path.is_file():
        raise FormatError(
            describe(CONFIG, str(folder), "there", "no such file", "Is it an adapter")
        )
    with path.open("rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        must = f"at most {MAX_CONFIG_BYTES} bytes"
        raise FormatError(describe("size", str(path), must, path.stat().st_size))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(describe("content", str(path), "JSON", str(error))) from error


def _pairs(
    path: Path, entries: Mapping[str, TensorEntry], config: AdapterConfig
) -> dict[str, tuple[str, str]]:
    """Return the names of the two tensors of each module, their shapes checked against the config
    and one another."""
    parts: dict[str, dict[str, str]] = {}
    for name, entry in entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            must = "base_model.model.MODULE.lora_A.weight or lora_B.weight"
            step = "Embeddings, DoRA and modules saved whole are not computed beside a base"
            raise FormatError(describe("tensor", str(path), must, name, step))
        if entry.dtype not in _KINDS or len(entry.shape) != 2:
            must = f"a matrix of {', '.join(_KINDS)}"
            got = (entry.dtype, entry.shape)
            raise FormatError(describe(f"tensor {name!r}", str(path), must, got))
        parts.setdefault(match["module"], {})[match["part"]] = name
    if not parts:
        raise FormatError(describe("tensors", str(path), "at least one pair", 0))
    pairs = {}
    for module, names in parts.items():
        if len(names) != 2:
            raise FormatError(describe(f"module {module!r}", str(path), "lora_A and lora_B", names))
        config.check_target(module)
        rank = config.rank_of(module)
        shapes = entries[names["A"]].shape, entries[names["B"]].shape
        if not shapes[0][0] == shapes[1][1] == rank <= MAX_RANK:
            must = f"[{rank}, in] and [out, {rank}], as {CONFIG} says, the rank at most {MAX_RANK}"
            raise FormatError(describe(f"shapes of {module!r}", str(path), must, shapes))
        pairs[module] = names["A"], names["B"]
    return pairs


def _read(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, np.ndarray]:
    """Return the tensors in float32. They are read and not mapped: a file that is cut off meanwhile
    must not end the process."""
    tensors = {}
    with path.open("rb") as file:
        for name, entry in entries.items():
            file.seek(entry.offset)
            values = file.read(entry.num_bytes)
            if len(values) != entry.num_bytes:
                step = "The file was cut off while it was read"
                must = f"{entry.num_bytes} bytes"
                raise FormatError(describe(f"data of {name!r}", str(path), must, len(values), step))
            tensors[name] = _float32(values, entry)
            if not np.isfinite(tensors[name]).all():
                got = "infinite or no number"
                raise FormatError(describe(f"values of {name!r}", str(path), "finite", got))
    return tensors


def _float32(values: bytes, entry: TensorEntry) -> np.ndarray:
    array = np.frombuffer(values, _KINDS[entry.dtype]).reshape(entry.shape)
    if entry.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _fingerprint(updates: Mapping[str, LowRankUpdate]) -> str:
    digest = hashlib.sha256()
    for name, update in sorted(updates.items()):
        digest.update(repr((name, update.down.shape, update.up.shape, update.scale)).encode())
        digest.update(np.ascontiguousarray(update.down).data)
        digest.update(np.ascontiguousarray(update.up).data)
    return digest.hexdigest()
