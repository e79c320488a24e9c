"""Checks a delta package without changing anything."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import BinaryIO

from deepseek.export.delta.applying import check_base, written
from deepseek.export.delta.keys import public_key
from deepseek.export.delta.making import Report
from deepseek.export.delta.package import opened


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a package that was found good says of itself."""

    base_name: str
    base_hash: str
    target_name: str
    target_hash: str
    package: str
    """`sha256:` and the hash of its manifest."""
    signed_by: str
    """The fingerprint of the key."""
    package_bytes: int
    target_bytes: int
    """Of the whole new bundle."""
    num_chunks: int
    is_applied: bool
    """Whether the new files were computed from a base and compared."""


def verify_delta(
    path: str | Path,
    trust: str | Path,
    base: str | Path | None = None,
    *,
    report: Report = lambda words, share: None,
) -> Checked:
    """Check a package: its signature, its structure and every byte; with a bundle also that it
    applies there and gives what was signed.

    Args:
        path: of the package.
        trust: the file of the public key that must have signed it.
        base: the folder of the bundle that it is to be applied to.
        report: called with what is being done and the share that is done.

    Raises:
        ConfigError: the bundle is another one than the package was made for.
        FormatError: the package is none, or damaged.
        VerifyError: it is unsigned, signed by another key, or was tampered with.
        MissingExtra: `cryptography` is not installed.
    """
    path = Path(path)
    with opened(path, public_key(trust)) as package:
        manifest = package.manifest
        if base is None:
            for name, chunk in manifest.chunks():
                package.payload(chunk)
                report(f"reading {name}", None)
        else:
            folder = Path(os.path.realpath(base))
            check_base(manifest, folder, report)
            for _ in written(package, folder, report, _nowhere):
                pass
        return Checked(
            base_name=manifest.base_name,
            base_hash=manifest.base_hash,
            target_name=manifest.card.name,
            target_hash=manifest.target_hash,
            package=package.id,
            signed_by=package.signed_by,
            package_bytes=path.stat().st_size,
            target_bytes=sum(record.size_bytes for record in manifest.card.files.values()),
            num_chunks=sum(1 for _ in manifest.chunks()),
            is_applied=base is not None,
        )


def _nowhere(name: str) -> BinaryIO:
    return Path(os.devnull).open("wb")
