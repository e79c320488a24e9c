"""A model at rest: a folder in Hugging Face layout with a card that says what it is and holds every
file's hash.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.hub.atomic import files_in, locked, recover, replace_file
from deepseek.hub.grids import read_grids, without_grids
from deepseek.hub.safetensors import TensorEntry, read_entries
from deepseek.hub.store import CARD, bundle_folder, stored_names
from deepseek.hub.stored_grid import StoredGrid
from deepseek.ops.routing import Routing
from deepseek.ops.scheme import KVStorage
from deepseek.records import (
    BundleCard,
    FileRecord,
    Measurement,
    Parent,
    StageRecord,
    Verdict,
)

SMALL_FILE_BYTES = 8 << 20
"""Files up to this size are hashed on every load; larger ones only when asked."""
_CHUNK_BYTES = 4 << 20
_MAX_JSON_BYTES = 64 << 20


class Bundle:
    """A bundle on this machine. Opening one checks what is cheap: sizes, small files' hashes,
    headers of weights.

    A folder without `bundle.json` is a bundle too: its card is made on the fly and nothing is
    written.
    """

    def __init__(self, path: Path, card: BundleCard, *, has_card: bool) -> None:
        """Join a folder and its card; use `Bundle.open`, which reads and checks them."""
        self.path = path
        self.card = card
        self.has_card = has_card

    def __repr__(self) -> str:
        return f"Bundle({self.card.name!r}, path={str(self.path)!r})"

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Bundle:
        """Return the bundle in a folder.

        Args:
            folder: a folder with `config.json` and weights in safetensors.
            verify: check the hash of every file, however large.

        Raises:
            FormatError: the folder is no model, or a file is missing, of another size or not what
                was written.
        """
        folder = Path(folder)
        recover(folder)
        if not (folder / "config.json").is_file():
            step = "Give the folder of a model, or pull one by name"
            raise FormatError(
                describe("folder", str(folder), "a model folder", "no config.json", step)
            )
        has_card = (folder / CARD).is_file()
        card = BundleCard.from_dict(read_json(folder / CARD)) if has_card else _card_of(folder)
        bundle = cls(folder, card, has_card=has_card)
        if has_card:
            bundle._check(everything=verify)
        bundle.grids  # noqa: B018 (reads and checks the headers)
        return bundle

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """What the headers of the weights say of each tensor."""
        return read_entries(self.path)

    @functools.cached_property
    def config(self) -> Mapping[str, object]:
        """The content of `config.json`."""
        return read_json(self.path / "config.json")

    @functools.cached_property
    def grids(self) -> Mapping[str, StoredGrid]:
        """Weights that lie on a grid of integers, by their names in the checkpoint, yet to be
        read.

        Raises:
            FormatError: a layout that is not read here, or tensors that do not fit it.
        """
        return read_grids(self.path, self.config, self.tensors)

    @property
    def plain_tensors(self) -> Mapping[str, TensorEntry]:
        """What the headers say of the weights that lie on no grid."""
        return without_grids(self.tensors, self.grids)

    @property
    def kv(self) -> KVStorage | None:
        """How keys and values are to be cached, as the card records it.

        Raises:
            FormatError: what it records is no storage.
        """
        recorded = self.card.kv
        for storage in get_args(KVStorage):
            if recorded == storage:
                return storage
        if recorded is not None:
            must = f"one of {', '.join(get_args(KVStorage))}"
            raise FormatError(describe("kv", str(self.path / CARD), must, recorded))
        return None

    @functools.cached_property
    def content_hash(self) -> str:
        """`sha256:` and the hash of the names and hashes of all files but `bundle.json`.

        For a folder without a card every file is read for it, once.
        """
        files = self.card.files
        if not self.has_card:
            files = {name: hash_file(self.path / name) for name in files}
        return content_hash(files)

    @property
    def routing(self) -> Routing | None:
        """How the layers choose the blocks that they see, as the card records it; None where it
        records nothing.

        Raises:
            FormatError: what it records is no routing.
        """
        recorded: object = self.card.attention
        if recorded is None:
            return None
        must, owner = "the fields of a Routing", str(self.path / CARD)
        if not isinstance(recorded, Mapping):
            raise FormatError(describe("attention", owner, must, recorded))
        try:
            return Routing.from_dict(recorded)
        except ConfigError as error:
            raise FormatError(describe("attention", owner, must, str(error))) from error

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but `bundle.json`."""
        return sum(record.size_bytes for record in self.card.files.values())

    @property
    def num_parameters(self) -> int:
        """Number of stored values; scales and zero points are none."""
        on_grids = sum(math.prod(grid.shape) for grid in self.grids.values())
        return on_grids + sum(entry.num_elements for entry in self.plain_tensors.values())

    def verify(self) -> None:
        """Read every file and compare it with the card.

        Raises:
            FormatError: names the first file that is not as it was written, or the bundle has no
                card.
        """
        if not self.has_card:
            step = "Make a bundle of it with hub.pull or hub.save"
            raise FormatError(
                describe(CARD, str(self.path), "there to verify against", "no card", step)
            )
        self._check(everything=True)

    def add_measurements(self, measurements: Iterable[Measurement]) -> None:
        """Add observations to the card on disk and here; a same-named one under the same conditions
        is replaced.

        Raises:
            FormatError: the bundle has no card to write them on.
            CapacityError: the disk is full; the old card is there.
        """
        self._must_have_card()
        fresh = list(measurements)
        with locked(self.path):
            card = BundleCard.from_dict(read_json(self.path / CARD))
            about = {_subject(item) for item in fresh}
            kept = [item for item in card.measurements if _subject(item) not in about]
            card = dataclasses.replace(card, measurements=(*kept, *fresh))
            replace_file(self.path / CARD, card_bytes(card))
        self.card = card

    def set_verdicts(self, verdicts: Iterable[Verdict]) -> None:
        """Put the verdicts of gates on the card on disk and here, in the place of older ones.

        Raises:
            FormatError: the bundle has no card to write them on.
            CapacityError: the disk is full; the old card is there.
        """
        self._must_have_card()
        with locked(self.path):
            card = BundleCard.from_dict(read_json(self.path / CARD))
            card = dataclasses.replace(card, verdicts=tuple(verdicts))
            replace_file(self.path / CARD, card_bytes(card))
        self.card = card

    def _must_have_card(self) -> None:
        if not self.has_card:
            step = "Make a bundle of it with hub.pull or hub.save"
            raise FormatError(
                describe(CARD, str(self.path), "there to be added to", "no card", step)
            )

    def _check(self, *, everything: bool) -> None:
        for name, record in self.card.files.items():
            path = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise FormatError(
                    describe("file name", str(self.path / CARD), "in the folder", name)
                )
            if not path.is_file():
                raise FormatError(
                    describe(f"file {name!r}", str(self.path), "there", "no such file")
                )
            size = path.stat().st_size
            if size != record.size_bytes:
                must = f"{record.size_bytes} bytes, as it was written"
                raise FormatError(describe(f"file {name!r}", str(self.path), must, size, _REPAIR))
            if everything or size <= SMALL_FILE_BYTES:
                found = hash_file(path).sha256
                if found != record.sha256:
                    must = f"as it was written (sha256 {record.sha256[:12]}…)"
                    raise FormatError(
                        describe(f"file {name!r}", str(self.path), must, found[:12] + "…", _REPAIR)
                    )


def routing_asked(
    attention: Literal["auto", "dense", "routed"] | str | Routing, bundle: Bundle | None
) -> Routing | None:
    """Return the routing that a caller's `attention` means.

    Args:
        attention: "routed" for the usual routing, "dense" for none, a Routing for itself; anything
            else says nothing of it, and the bundle's card decides.
        bundle: what is loaded; None for a file without a card.

    Raises:
        FormatError: the card decides, and what it records is no routing.
    """
    if isinstance(attention, Routing):
        return attention
    if attention == "routed":
        return Routing()
    return None if attention == "dense" or bundle is None else bundle.routing


_REPAIR = "The file was changed or is damaged: fetch or save the bundle again"


def list_bundles() -> list[Bundle]:
    """Return the bundles in the store, by name; one that is damaged is left out with a warning in
    the log.
    """
    import logging

    found = []
    for name in stored_names():
        try:
            found.append(Bundle.open(bundle_folder(name)))
        except FormatError as error:
            logging.getLogger(__name__).warning("left out of the list: %s", error)
    return found


def make_card(
    folder: Path,
    files: Mapping[str, FileRecord],
    *,
    name: str,
    summary: str = "",
    license: str = "",
    stage: StageRecord | None = None,
    parents: Sequence[Parent] = (),
    measurements: Sequence[Measurement] = (),
    attention: Mapping[str, Any] | None = None,
    kv: KVStorage | None = None,
) -> BundleCard:
    """Return the card of a folder that was just written; files not in `files` are hashed now."""
    names = sorted(set(files_in(folder)) - {CARD})
    return BundleCard(
        name=name,
        summary=summary,
        license=license,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        parents=tuple(parents),
        stage=stage,
        versions=versions(),
        files={item: files[item] if item in files else hash_file(folder / item) for item in names},
        measurements=tuple(measurements),
        attention=attention,
        kv=kv,
    )


def card_bytes(card: BundleCard) -> bytes:
    """Return a card as it is written."""
    return (
        json.dumps(card.to_dict(), indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    )


def versions() -> dict[str, str]:
    """Return the versions of what writes a bundle, without importing any of it."""
    import importlib.metadata

    found = {"python": platform.python_version()}
    for package in ("deepseek-stack", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def content_hash(files: Mapping[str, FileRecord]) -> str:
    """Return the hash of a set of files: of their sorted names and hashes, one line each."""
    lines = "".join(f"{record.sha256}  {name}\n" for name, record in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Return the hash and the size of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=size)


def read_json(path: Path) -> dict[str, object]:
    """Return the table in a JSON file.

    Raises:
        FormatError: it is missing, too large, or not a JSON table.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            must = f"at most {_MAX_JSON_BYTES} bytes"
            raise FormatError(describe("size", str(path), must, path.stat().st_size))
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FormatError(describe("file", str(path), "there", "no such file")) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(describe("content", str(path), "JSON", str(error))) from error
    if not isinstance(content, dict):
        raise FormatError(describe("content", str(path), "a JSON table", content))
    return content


def _card_of(folder: Path) -> BundleCard:
    """Return the card of a folder that has none: names and sizes, hashes left empty until they are
    asked for.
    """
    names = [name for name in files_in(folder) if not name.startswith(".")]
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    files = {name: FileRecord(sha256="", size_bytes=size) for name, size in sizes.items()}
    return BundleCard(name=Path(folder).resolve().name, files=files)


def _subject(measurement: Measurement) -> str:
    conditions = json.dumps(measurement.to_dict()["conditions"], sort_keys=True, default=str)
    return f"{measurement.name} {conditions}"
