"""Applies a delta package to a bundle, and takes the bundle back to the version before.

The new version is written beside the old one, checked against the hashes that were signed, brought
to the disk, and then the two folders change places in one step (`hub.atomic`): a power cut at any
moment leaves the old version or the new one, whole. Whoever applies the package again goes on from
there. Memory is needed for a chunk at a time, whatever the model's size.

Kept for `rollback`: `.NAME.before-HASH` beside the bundle, by hard links, so that files which both
versions have take no room; until the next package is applied, or `forget`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from deepseek.errors import (
    CapacityError,
    ConfigError,
    FormatError,
    VerifyError,
    describe,
)
from deepseek.export.delta import chunks
from deepseek.export.delta.keys import public_key
from deepseek.export.delta.making import Report, card_of
from deepseek.export.delta.manifest import Chunk, Manifest
from deepseek.export.delta.package import Package, opened
from deepseek.hub import Bundle
from deepseek.hub.atomic import clean, files_in, recover, replace_folder
from deepseek.hub.bundle import card_bytes, hash_file
from deepseek.hub.store import CARD

_SPARE_BYTES = 4 << 20
"""Left free on the disk beside what is written."""
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class Applied:
    """What `apply_delta` did."""

    bundle: Bundle
    is_changed: bool
    """False where the bundle was the new version already."""
    base_hash: str
    package: str
    """The identity of the package: `sha256:` and the hash of its manifest."""


def apply_delta(
    path: str | Path,
    to: str | Path,
    trust: str | Path,
    *,
    keeps_before: bool = True,
    report: Report = lambda words, share: None,
) -> Applied:
    """Turn a bundle into the version that a package brings; all of it or nothing.

    Args:
        path: of the package.
        to: the bundle's folder. Files of yours in it stay.
        trust: the file of the public key that must have signed the package.
        keeps_before: keep the version before for `rollback`.
        report: called with what is being done and the share that is done.

    Returns:
        the bundle, whose files are those that the package was made from, bit for bit, and whose
        card says that they came by it.

    Raises:
        ConfigError: the bundle is another one than the package was made for.
        FormatError: the package is none, or damaged; or the bundle is.
        VerifyError: the package is unsigned, signed by another key, or was tampered with.
        CapacityError: the disk is too full.
        MissingExtra: `cryptography` is not installed.
    """
    key = public_key(trust)
    with opened(path, key) as package:
        manifest = package.manifest
        folder = Path(os.path.realpath(to))
        bundle = Bundle.open(folder)
        if bundle.has_card and bundle.content_hash == manifest.target_hash:
            bundle.verify()
            return Applied(bundle, False, manifest.base_hash, package.id)
        check_base(manifest, folder, report)
        _check_room(manifest, folder)
        if keeps_before:
            _keep_before(folder, manifest)
        card = card_of(manifest, package.id, package.signed_by)
        with replace_folder(folder, keep=_keeps(manifest)) as fresh:
            for name in written(package, folder, report, lambda name: _create(fresh, name)):
                report(f"wrote {name}", None)
            (fresh / CARD).write_bytes(card_bytes(card))
        forget(folder, but=manifest.base_hash if keeps_before else None)
    return Applied(Bundle(folder, card, has_card=True), True, manifest.base_hash, package.id)


def rollback(to: str | Path) -> Bundle:
    """Take a bundle back to the version before the package that was applied last.

    Raises:
        ConfigError: no package made this version, or the version before was not kept.
        FormatError: what was kept is damaged; nothing was changed.
    """
    folder = Path(os.path.realpath(to))
    bundle = Bundle.open(folder)
    stage = bundle.card.stage
    if stage is None or stage.name != "delta":
        got = "no stage" if stage is None else stage.name
        raise ConfigError(describe("bundle", "delta rollback", "made by a delta package", got))
    base = str(stage.settings.get("base"))
    kept = _before(folder, base)
    recover(kept)
    if not kept.is_dir():
        must, step = "kept beside the bundle", "Fetch that version as a whole"
        raise ConfigError(describe("version before", str(folder), must, "none", step))
    before = Bundle.open(kept, verify=True)
    theirs = {*bundle.card.files, CARD}
    with replace_folder(folder, keep=lambda name: name not in theirs and _is_users(name)) as fresh:
        _link_all(kept, fresh, files_in(kept))
    shutil.rmtree(kept, ignore_errors=True)
    return Bundle(folder, before.card, has_card=before.has_card)


def forget(to: str | Path, *, but: str | None = None) -> None:
    """Remove the versions that were kept of a bundle.

    Args:
        to: the bundle's folder.
        but: the content hash of one that stays.
    """
    folder = Path(os.path.realpath(to))
    stays = None if but is None else _before(folder, but).name
    begin = f".{folder.name}.before-"
    for entry in list(folder.parent.iterdir()):
        if entry.name.startswith(begin) and entry.name != stays:
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name.startswith("." + begin):
            clean(folder.with_name(entry.name[1:].partition(".new-")[0]))


def check_base(manifest: Manifest, folder: Path, report: Report) -> None:
    """Raise a ConfigError unless a folder holds the files that a package was made for."""
    owner = str(folder)
    step = f"The package is for {manifest.base_name}, {manifest.base_hash[:19]}…"
    for number, (name, record) in enumerate(sorted(manifest.base_files.items())):
        report(f"checking {name}", number / len(manifest.base_files))
        path = folder / name
        if not path.is_file():
            must = "there, as in the version that the package is for"
            raise ConfigError(describe(f"file {name!r}", owner, must, "no such file", step))
        found = path.stat().st_size == record.size_bytes and hash_file(path) == record
        if not found:
            must = f"that of the version that the package is for (sha256 {record.sha256[:12]}…)"
            raise ConfigError(describe(f"file {name!r}", owner, must, "another", step))


def written(
    package: Package, folder: Path, report: Report, create: Callable[[str], BinaryIO]
) -> Iterator[str]:
    """Write the files of a package, one after another, and yield the name of each that is whole.

    Args:
        package: at its first payload.
        folder: of the old bundle.
        report: told of the share that is done.
        create: opens a file to write to.

    Raises:
        FormatError: a payload is none of its chunk, or the old files were changed on the way.
        VerifyError: a payload or a file is not what was signed.
    """
    manifest = package.manifest
    total, done = max(1, manifest.target_bytes), 0
    for name, recipe in manifest.recipes.items():
        digest = hashlib.sha256()
        with create(name) as file:
            for chunk in recipe:
                for piece in _pieces(package, folder, chunk):
                    digest.update(piece)
                    file.write(piece)
                    done += len(piece)
                report(f"writing {name}", done / total)
        expected = manifest.card.files[name].sha256
        if digest.hexdigest() != expected:
            must, got = f"as it was signed (sha256 {expected[:12]}…)", digest.hexdigest()[:12] + "…"
            raise VerifyError(describe(f"file {name!r}", str(package.path), must, got))
        yield name


def _pieces(package: Package, folder: Path, chunk: Chunk) -> Iterator[bytes | memoryview]:
    payload = package.payload(chunk)
    if chunk.kind == chunks.LITERAL:
        yield chunks.decode(chunk.kind, payload, None, chunk.length)
        return
    with (folder / chunk.source).open("rb") as file:
        file.seek(chunk.offset)
        for at in range(0, chunk.length, chunks.CHUNK_BYTES):
            length = min(chunks.CHUNK_BYTES, chunk.length - at)
            old = file.read(length)
            if len(old) != length:
                must = f"{length} bytes at {chunk.offset + at}"
                raise FormatError(describe(f"file {chunk.source!r}", str(folder), must, len(old)))
            is_copy = chunk.kind == chunks.COPY
            yield old if is_copy else chunks.decode(chunk.kind, payload, old, length)


def _check_room(manifest: Manifest, folder: Path) -> None:
    disk = os.statvfs(folder.parent)
    free = disk.f_bavail * disk.f_frsize
    needed = manifest.target_bytes + _SPARE_BYTES
    if needed > free:
        step = "Free some space; the bundle is as it was"
        got = f"{free} bytes free"
        raise CapacityError(describe("disk", str(folder), f"free for {needed} bytes", got, step))


def _keeps(manifest: Manifest) -> Callable[[str], bool]:
    """Return which files of the old folder go on in the new one: those that are equal, and the
    user's own."""
    same = set(manifest.card.files) - set(manifest.recipes)
    theirs = {*manifest.base_files, *manifest.card.files, CARD}
    return lambda name: name in same or (name not in theirs and _is_users(name))


def _is_users(name: str) -> bool:
    # weights that no card names would be loaded in place of the new ones
    return not name.endswith(_WEIGHTS)


def _create(fresh: Path, name: str) -> BinaryIO:
    path = fresh / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


def _before(folder: Path, content: str) -> Path:
    return folder.with_name(f".{folder.name}.before-{content.removeprefix('sha256:')[:16]}")


def _keep_before(folder: Path, manifest: Manifest) -> None:
    kept = _before(folder, manifest.base_hash)
    names = [*manifest.base_files, *([CARD] if (folder / CARD).is_file() else [])]
    with replace_folder(kept) as fresh:
        _link_all(folder, fresh, names)


def _link_all(source: Path, fresh: Path, names: Iterable[str]) -> None:
    """Give files a second name; copies where the disk has no links."""
    for name in names:
        place = fresh / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, place)
        except OSError:
            shutil.copy2(source / name, place)
