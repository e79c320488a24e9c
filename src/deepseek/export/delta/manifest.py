"""What a delta package says of itself, read as from a stranger: names, sizes and places are checked
before anything is done with them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from deepseek.errors import FormatError, describe
from deepseek.export.delta.chunks import (
    CHUNK_BYTES,
    COPY,
    DIFFERENCES,
    LITERAL,
    MAX_PAYLOAD_BYTES,
)
from deepseek.hub.bundle import content_hash
from deepseek.hub.store import CARD
from deepseek.records import BundleCard, FileRecord

FORMAT_VERSION = 1
_HASH = re.compile("[0-9a-f]{64}")
_MOST = 1 << 62
Files = Mapping[str, FileRecord]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A stretch of a new file, and how it is made."""

    kind: str
    """`copy`, `literal`, or a difference: see `chunks.DIFFERENCES`."""
    source: str
    """The old file that it stands on; empty for a literal."""
    offset: int
    """Of the first byte there."""
    length: int
    """Bytes of the new file."""
    payload_bytes: int
    sha256: str
    """Of the payload."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a package turns into what."""

    base_name: str
    base_files: Files
    """All files of the old bundle but its card."""
    card: BundleCard
    """Of the new bundle, with all its files."""
    recipes: Mapping[str, tuple[Chunk, ...]]
    """The chunks of each file that is new or changed."""

    @property
    def base_hash(self) -> str:
        """The content hash of the old bundle."""
        return content_hash(self.base_files)

    @property
    def target_hash(self) -> str:
        """The content hash of the new bundle."""
        return content_hash(self.card.files)

    @property
    def target_bytes(self) -> int:
        """Bytes of the files that are written."""
        return sum(self.card.files[name].size_bytes for name in self.recipes)

    def chunks(self) -> Iterator[tuple[str, Chunk]]:
        """Yield every chunk with its file, in the order of the payloads."""
        for name, chunks in self.recipes.items():
            for chunk in chunks:
                yield name, chunk

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `read_manifest` reads them."""
        sources = sorted(self.base_files)
        numbers = {name: number for number, name in enumerate(sources)}
        base = {name: dataclasses.asdict(self.base_files[name]) for name in sources}
        recipes = {
            name: [[*_row(chunk, numbers.get(chunk.source, -1))] for chunk in chunks]
            for name, chunks in self.recipes.items()
        }
        return {
            "format_version": FORMAT_VERSION,
            "base": {"name": self.base_name, "files": base},
            "card": self.card.to_dict(),
            "recipes": recipes,
        }


def read_manifest(text: bytes, owner: str) -> Manifest:
    """Return the manifest in a package.

    Args:
        text: JSON.
        owner: the package, for messages.

    Raises:
        FormatError: it is no manifest, or it says what cannot be: a name that leads out of the
            bundle, a chunk that is too large or stands on bytes that the old file does not have,
            chunks that do not add up to their file.
    """
    try:
        values = json.loads(text)
        version = values["format_version"]
        if version != FORMAT_VERSION:
            step = "Upgrade deepseek-stack"
            raise FormatError(describe("format_version", owner, str(FORMAT_VERSION), version, step))
        base = _files(values["base"]["files"], owner)
        card = BundleCard.from_dict(values["card"])
        _files({name: dataclasses.asdict(record) for name, record in card.files.items()}, owner)
        sources = sorted(base)
        recipes = {
            str(name): tuple(_chunk(row, sources, base, owner) for row in rows)
            for name, rows in values["recipes"].items()
        }
        found = Manifest(str(values["base"]["name"]), base, card, recipes)
    except FormatError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise FormatError(describe("manifest", owner, "one of a delta package", got)) from error
    _check_recipes(found, owner)
    return found


def _row(chunk: Chunk, source: int) -> tuple[object, ...]:
    return (chunk.kind, source, chunk.offset, chunk.length, chunk.payload_bytes, chunk.sha256)


def _files(values: Mapping[str, Any], owner: str) -> dict[str, FileRecord]:
    found = {}
    for name, fields in values.items():
        _check_name(name, owner)
        record = FileRecord(sha256=fields["sha256"], size_bytes=_natural(fields["size_bytes"]))
        if not _HASH.fullmatch(record.sha256):
            raise FormatError(describe(f"hash of {name!r}", owner, "a SHA-256", record.sha256))
        found[name] = record
    for name in found:
        if any(str(parent) in found for parent in PurePosixPath(name).parents):
            raise FormatError(describe("file name", owner, "in no other file", name))
    return found


def _check_name(name: str, owner: str) -> None:
    """Raise unless a name stays within a bundle on every system and is no card."""
    name.encode()  # half a surrogate pair is no character
    parts = name.split("/")
    is_safe = all(part not in ("", ".", "..") for part in parts)
    if not is_safe or name == CARD or any(letter in '\\:*?"<>|' or letter < " " for letter in name):
        raise FormatError(describe("file name", owner, "that of a file in the bundle", name))


def _natural(value: object) -> int:
    # `type(...) is int` because True and False are no sizes
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} is no size")
    return value


def _chunk(row: Any, sources: list[str], base: Files, owner: str) -> Chunk:
    kind, source, offset, length, payload, digest = row
    offset, length, payload = (_natural(value) for value in (offset, length, payload))
    if kind not in (COPY, LITERAL, *DIFFERENCES):
        raise FormatError(describe("chunk", owner, "of a known kind", kind, "Upgrade it"))
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise FormatError(describe("hash of a chunk", owner, "a SHA-256", digest))
    if payload > MAX_PAYLOAD_BYTES or (kind != COPY and length > CHUNK_BYTES):
        must = f"at most {CHUNK_BYTES} bytes and {MAX_PAYLOAD_BYTES} of payload"
        raise FormatError(describe("chunk", owner, must, f"{length} and {payload}"))
    if kind == LITERAL:
        return Chunk(kind, "", 0, length, payload, digest)
    name = sources[_natural(source)] if _natural(source) < len(sources) else ""
    if not name or offset + length > base[name].size_bytes:
        must = "within a file of the old bundle"
        raise FormatError(describe("source of a chunk", owner, must, [source, offset, length]))
    return Chunk(kind, name, offset, length, payload, digest)


def _check_recipes(manifest: Manifest, owner: str) -> None:
    files = manifest.card.files
    changed = {name for name in files if manifest.base_files.get(name) != files[name]}
    if changed != set(manifest.recipes):
        got = sorted(changed ^ set(manifest.recipes))[:3]
        raise FormatError(describe("recipes", owner, "those of all changed files", got))
    for name, chunks in manifest.recipes.items():
        length = sum(chunk.length for chunk in chunks)
        if length != files[name].size_bytes or not all(chunk.length for chunk in chunks):
            must = f"chunks of {files[name].size_bytes} bytes in all"
            raise FormatError(describe(f"recipe of {name!r}", owner, must, length))
