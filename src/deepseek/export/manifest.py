"""`export.json`: what an exported folder is, what it was made from, and every file's hash. Loads no
torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from deepseek.errors import FormatError, describe
from deepseek.hub.atomic import files_in
from deepseek.hub.bundle import Bundle, hash_file, read_json, versions
from deepseek.records import FileRecord

MANIFEST = "export.json"
VERSION = 1
_AGAIN = "The files were changed or are damaged: export the model again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What stands in `export.json`."""

    format: str
    kind: str
    """`decoder`, `encoder` or `classifier`."""
    source: str
    """Name of the model."""
    source_hash: str
    """`sha256:` and the hash of the names and hashes of its files, as a bundle has it."""
    source_files: Mapping[str, str]
    """sha256 of each of its files."""
    options: Mapping[str, Any]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    """Every file of the folder but this one."""

    @classmethod
    def of(
        cls,
        folder: Path,
        format: str,
        kind: str,
        bundle: Bundle,
        options: Mapping[str, object],
        notes: Sequence[str],
    ) -> Manifest:
        """Return the manifest of a folder that was just written; its files are hashed."""
        card = bundle.card.files
        hashes = {
            name: card[name].sha256 or hash_file(bundle.path / name).sha256 for name in sorted(card)
        }
        return cls(
            format=format,
            kind=kind,
            source=bundle.card.name,
            source_hash=bundle.content_hash,
            source_files=hashes,
            options=dict(options),
            notes=tuple(notes),
            versions=versions(),
            files={name: hash_file(folder / name) for name in files_in(folder)},
        )

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest of a folder.

        Raises:
            FormatError: it is missing, or not what `write` writes.
        """
        path = folder / MANIFEST
        content = read_json(path)
        if content.pop("version", None) != VERSION:
            raise FormatError(describe("version", str(path), str(VERSION), "another"))
        names = {each.name for each in dataclasses.fields(cls)}
        if set(content) != names:
            must = f"the fields {', '.join(sorted(names))}"
            raise FormatError(describe("content", str(path), must, sorted(content)))
        for name in ("format", "kind", "source", "source_hash"):
            if not isinstance(content[name], str):
                raise FormatError(describe(name, str(path), "a text", content[name]))
        for name in ("source_files", "options", "versions", "files"):
            if not isinstance(content[name], dict):
                raise FormatError(describe(name, str(path), "a table", content[name]))
        notes = content["notes"]
        if not isinstance(notes, list) or not all(isinstance(each, str) for each in notes):
            raise FormatError(describe("notes", str(path), "a list of texts", notes))
        files = {name: _record(path, name, each) for name, each in content["files"].items()}  # type: ignore[union-attr]
        return cls(**{**content, "notes": tuple(notes), "files": files})  # type: ignore[arg-type]

    def check(self, folder: Path) -> None:
        """Read every file and compare it with what was written.

        Raises:
            FormatError: names the first file that is missing, of another size or changed.
        """
        for name, record in self.files.items():
            path = folder / name
            what = f"file {name!r}"
            if not path.is_file():
                raise FormatError(describe(what, str(folder), "there", "no such file", _AGAIN))
            size = path.stat().st_size
            if size != record.size_bytes:
                must = f"{record.size_bytes} bytes, as it was written"
                raise FormatError(describe(what, str(folder), must, size, _AGAIN))
            found = hash_file(path).sha256
            if found != record.sha256:
                must = f"as it was written (sha256 {record.sha256[:12]}…)"
                raise FormatError(describe(what, str(folder), must, found[:12] + "…", _AGAIN))


def _record(path: Path, name: str, entry: object) -> FileRecord:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise FormatError(describe("file name", str(path), "in the folder", name))
    fields = entry if isinstance(entry, dict) else {}
    sha256, size = fields.get("sha256"), fields.get("size_bytes")
    if not isinstance(sha256, str) or type(size) is not int or len(fields) != 2:
        raise FormatError(describe(f"file {name!r}", str(path), "a sha256 and size_bytes", entry))
    return FileRecord(sha256=sha256, size_bytes=size)
