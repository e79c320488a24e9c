"""Ed25519 keys in PEM files, as openssl makes and reads them too."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.errors import ConfigError, FormatError, describe, missing_extra
from deepseek.hub.atomic import writing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

PUBLIC_BYTES, SIGNATURE_BYTES = 32, 64
_MAX_BYTES = 1 << 16


def make_keys(path: str | Path) -> tuple[Path, Path]:
    """Make a key pair: the private key, which its owner alone may read, and beside it `.pub`.

    Args:
        path: of the private key; neither file may be there.

    Raises:
        ConfigError: a file is there, or the place cannot be written to.
        MissingExtra: `cryptography` is not installed.
    """
    _need()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    private = Path(path)
    public = private.with_name(private.name + ".pub")
    for place in (private, public):
        if place.exists():
            step = "Choose another name: a key that is lost cannot be made again"
            raise ConfigError(describe("key", "delta", "a new file", str(place), step))
    key = Ed25519PrivateKey.generate()
    texts = {
        private: key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        public: key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }
    for place, mode in ((private, 0o600), (public, 0o644)):
        with writing(place):
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(handle, "wb") as file:
                file.write(texts[place])
                file.flush()
                os.fsync(file.fileno())
    return private, public


def private_key(path: str | Path) -> Ed25519PrivateKey:
    """Return the key that signs.

    Raises:
        ConfigError: there is no such file.
        FormatError: it holds no Ed25519 private key without a password.
    """
    _need()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    text = _read(path)
    try:
        key: object = load_pem_private_key(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "private", "something else") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private", type(key).__name__)
    return key


def public_key(path: str | Path) -> Ed25519PublicKey:
    """Return the key whose packages are trusted.

    Raises:
        ConfigError: there is no such file.
        FormatError: it holds no Ed25519 public key.
    """
    _need()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    text = _read(path)
    try:
        key: object = load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "public", "something else") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public", type(key).__name__)
    return key


def fingerprint(public: bytes) -> str:
    """Return what a person compares of a public key: the first 16 digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def _need() -> None:
    try:
        import cryptography  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise missing_extra("cryptography", "delta", "to sign and to check packages") from error


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_BYTES)
    except (FileNotFoundError, IsADirectoryError) as error:
        step = "Make a pair with: deepseek delta key FILE"
        raise ConfigError(describe("key", "delta", "a file", str(path), step)) from error


def _no_key(path: str | Path, kind: str, got: str) -> FormatError:
    must = f"an Ed25519 {kind} key in PEM"
    must += " without a password" if kind == "private" else ""
    step = "Make a pair with: deepseek delta key FILE"
    return FormatError(describe("key", str(path), must, got, step))
