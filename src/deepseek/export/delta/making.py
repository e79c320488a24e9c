"""Makes a delta package out of two bundles."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deepseek.errors import ConfigError, describe
from deepseek.export.delta import chunks, planes
from deepseek.export.delta.align import Span, spans
from deepseek.export.delta.keys import private_key
from deepseek.export.delta.manifest import Chunk, Manifest, read_manifest
from deepseek.export.delta.package import head_of, write_manifest
from deepseek.hub import Bundle
from deepseek.hub.atomic import writing
from deepseek.hub.bundle import hash_file
from deepseek.hub.store import CARD
from deepseek.records import BundleCard, FileRecord, Measurement, Parent, StageRecord

Report = Callable[[str, float | None], None]
_COPY_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Made:
    """A package that was made."""

    path: Path
    package_bytes: int
    bundle_bytes: int
    """Of the new bundle, which it stands for."""
    bytes_by_kind: Mapping[str, int]
    """Of payloads, by how their chunks are written."""
    entropy_bytes: float
    """What the differences of codes would take at least, each taken as drawn independently from the
    spread of its chunk."""

    @property
    def share(self) -> float:
        """Bytes of the package for each byte of the new bundle."""
        return self.package_bytes / self.bundle_bytes

    @property
    def measurements(self) -> list[Measurement]:
        """The package's size, its share of the new bundle's, and that of the entropy bound."""
        whole = {"bundle_bytes": self.bundle_bytes}
        bound = self.entropy_bytes / self.bundle_bytes
        return [
            Measurement(name="package_bytes", value=self.package_bytes, unit="bytes"),
            Measurement(name="package_share", value=self.share, unit="1", conditions=whole),
            Measurement(name="code_entropy_share", value=bound, unit="1", conditions=whole),
        ]


def make_delta(
    old: str | Path | Bundle,
    new: str | Path | Bundle,
    path: str | Path,
    key: str | Path,
    *,
    report: Report = lambda words, share: None,
) -> Made:
    """Write the package that turns one bundle into another, bit for bit.

    It is small where the weights of both lie on the same grid, so that most codes are equal: see
    `on_grid_of` for a fine-tuned model in floats. It is right for any two bundles.

    Args:
        old: the bundle that the package will be applied to: a folder, or opened.
        new: what it becomes.
        path: of the package; written whole or not at all, one that is there is replaced.
        key: the file of the private key that signs it.
        report: called with what is being done and the share that is done.

    Raises:
        ConfigError: both are the same, or a place cannot be written to.
        FormatError: a bundle is not as its card says, or the key is none.
        CapacityError: the disk is full.
        MissingExtra: `cryptography` is not installed.
    """
    signer = private_key(key)
    old, new = (
        each if isinstance(each, Bundle) else Bundle.open(Path(each)) for each in (old, new)
    )
    report("reading both bundles", 0.0)
    base, card = hashed_files(old), dataclasses.replace(new.card, files=hashed_files(new))
    changed = [name for name, record in sorted(card.files.items()) if base.get(name) != record]
    if not changed and set(base) == set(card.files):
        raise ConfigError(describe("NEW", "delta make", "another version than OLD", str(new.path)))
    path = Path(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with writing(path), tempfile.TemporaryFile(dir=path.absolute().parent) as payloads:
        writer = _Writer(old, new, payloads, sum(card.files[name].size_bytes for name in changed))
        recipes = {name: tuple(writer.chunks_of(name, report)) for name in changed}
        manifest = Manifest(old.card.name, base, card, recipes)
        text = write_manifest(manifest)
        read_manifest(text, str(path))
        payloads.seek(0)
        size = _write_whole(path, head_of(text, signer), payloads)
    whole = sum(record.size_bytes for record in card.files.values())
    return Made(path, size, whole, writer.bytes_by_kind, writer.entropy)


def hashed_files(bundle: Bundle) -> Mapping[str, FileRecord]:
    """Return the files of a bundle with the hashes that they have now.

    Raises:
        FormatError: one is not as the card says.
    """
    if bundle.has_card:
        bundle.verify()
        return bundle.card.files
    return {name: hash_file(bundle.path / name) for name in bundle.card.files if name != CARD}


class _Writer:
    """Writes payloads and counts them."""

    def __init__(self, old: Bundle, new: Bundle, payloads: BinaryIO, total: int) -> None:
        self.old, self.new, self.payloads = old, new, payloads
        self.total, self.done = total, 0
        self.bytes_by_kind: dict[str, int] = {}
        self.entropy = 0.0

    def chunks_of(self, name: str, report: Report) -> Iterator[Chunk]:
        """Yield the chunks of one file; neighbouring copies are one."""
        last: Chunk | None = None
        with (self.new.path / name).open("rb") as file:
            for span in spans(self.old, self.new, name):
                for chunk in self._of_span(span, file):
                    if last is not None and _follows(last, chunk):
                        last = dataclasses.replace(last, length=last.length + chunk.length)
                        continue
                    if last is not None:
                        yield last
                    last = chunk
                report(f"comparing {name}", self.done / max(1, self.total))
        if last is not None:
            yield last

    def _of_span(self, span: Span, file: BinaryIO) -> Iterator[Chunk]:
        for at in range(0, span.length, chunks.CHUNK_BYTES):
            fresh = file.read(min(chunks.CHUNK_BYTES, span.length - at))
            before = self._source(span, at, len(fresh))
            kind, payload = chunks.encode(fresh, before, span.kinds)
            if kind in ("bytes", "nibbles") and before is not None:
                self.entropy += _entropy(kind, fresh, before)
            self.payloads.write(payload)
            self.done += len(fresh)
            self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + len(payload)
            source, offset = ("", 0) if kind == chunks.LITERAL else (span.source, span.offset + at)
            digest = hashlib.sha256(payload).hexdigest()
            yield Chunk(kind, source, offset, len(fresh), len(payload), digest)

    def _source(self, span: Span, at: int, length: int) -> bytes | None:
        if not span.source:
            return None
        with (self.old.path / span.source).open("rb") as file:
            file.seek(span.offset + at)
            return file.read(length)


def _follows(last: Chunk, chunk: Chunk) -> bool:
    return (
        last.kind == chunk.kind == chunks.COPY
        and last.source == chunk.source
        and last.offset + last.length == chunk.offset
    )


def _entropy(kind: str, fresh: bytes, before: bytes) -> float:
    new, old = np.frombuffer(fresh, np.uint8), np.frombuffer(before, np.uint8)
    if kind == "bytes":
        return planes.entropy_bytes(new - old)
    halves = ((new & 15) - (old & 15)) & 15, ((new >> 4) - (old >> 4)) & 15
    return planes.entropy_bytes(np.concatenate(halves))


def _write_whole(path: Path, head: bytes, payloads: BinaryIO) -> int:
    """Write a package beside its place, and give it its name when it is on the disk."""
    fresh = path.with_name(f".{path.name}.new-{os.urandom(4).hex()}")
    try:
        with fresh.open("wb") as file:
            size = file.write(head)
            while piece := payloads.read(_COPY_BYTES):
                size += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return size


def card_of(manifest: Manifest, package_id: str, signed_by: str) -> BundleCard:
    """Return the card of the bundle that a package makes: that of the new one, whose lineage says
    that it came as a package, out of what, and what the new bundle itself was made from."""
    made = manifest.card.to_dict()
    settings = {
        "base": manifest.base_hash,
        "target": manifest.target_hash,
        "package": package_id,
        "signed_by": signed_by,
        "stage": made["stage"],
        "parents": made["parents"],
    }
    return dataclasses.replace(
        manifest.card,
        parents=(
            Parent(name=manifest.base_name, content_hash=manifest.base_hash),
            Parent(name=f"delta package of {manifest.card.name}", content_hash=package_id),
        ),
        stage=StageRecord(name="delta", settings=settings),
    )
