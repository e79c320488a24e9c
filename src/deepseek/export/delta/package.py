"""The file of a delta package: what it turns into what, signed, and the chunks that do it.

Layout, integers in little-endian order:

| bytes | what |
| --- | --- |
| 8 | `DSDELTA` and the version of the format, 1 |
| 4 | length of the manifest |
| … | the manifest, JSON |
| 32 | the public key |
| 64 | its Ed25519 signature of all bytes before |
| … | the payloads of the chunks, in the manifest's order, to the end of the file |

The manifest names every file of the old and the new bundle with size and SHA-256, and each chunk
with the SHA-256 of its payload, so the signature covers every byte. Nothing of it is read before
the signature was found good.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from deepseek.errors import ConfigError, FormatError, VerifyError, describe
from deepseek.export.delta.keys import PUBLIC_BYTES, SIGNATURE_BYTES, fingerprint
from deepseek.export.delta.manifest import Chunk, Manifest, read_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

MAGIC = b"DSDELTA\x01"
MAX_MANIFEST_BYTES = 64 << 20
_LENGTH_BYTES = 4
_STEP = "Fetch the package again"


class Package(NamedTuple):
    """A package whose signature was found good."""

    path: Path
    manifest: Manifest
    id: str
    """`sha256:` and the hash of the manifest, which stands for the whole file."""
    signed_by: str
    """The fingerprint of its key."""
    file: BinaryIO
    """At the first payload."""

    def payload(self, chunk: Chunk) -> bytes:
        """Return the payload of the next chunk.

        Raises:
            VerifyError: it is not what was signed.
        """
        data = self.file.read(chunk.payload_bytes)
        if hashlib.sha256(data).hexdigest() != chunk.sha256:
            must = f"as it was signed (sha256 {chunk.sha256[:12]}…)"
            raise VerifyError(describe("chunk", str(self.path), must, "other bytes", _STEP))
        return data


def head_of(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """Return the beginning of a package, signed: all of it but the payloads.

    Raises:
        ConfigError: the manifest is too long.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if len(manifest) > MAX_MANIFEST_BYTES:
        must = f"at most {MAX_MANIFEST_BYTES} bytes"
        raise ConfigError(describe("manifest", "delta make", must, len(manifest)))
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    signed = MAGIC + len(manifest).to_bytes(_LENGTH_BYTES, "little") + manifest + public
    return signed + key.sign(signed)


@contextlib.contextmanager
def opened(path: str | Path, trust: Ed25519PublicKey) -> Iterator[Package]:
    """Open a package and check who signed it and that its parts fit together.

    Args:
        path: of the package.
        trust: the key that must have signed it.

    Raises:
        ConfigError: there is no such file.
        FormatError: it is no package, is cut, or says what cannot be.
        VerifyError: it is not signed, by another key, or not what was signed.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(describe("package", "delta", "a file", str(path))) from error
    with file:
        size = path.stat().st_size
        head = file.read(len(MAGIC) + _LENGTH_BYTES)
        if head[: len(MAGIC)] != MAGIC:
            step = "Give a file that deepseek delta make wrote, or upgrade deepseek-stack"
            raise FormatError(describe("file", str(path), "a delta package", head[:8], step))
        length = int.from_bytes(head[len(MAGIC) :], "little")
        room = size - len(head) - PUBLIC_BYTES - SIGNATURE_BYTES
        if length > min(room, MAX_MANIFEST_BYTES):
            must = f"at most {max(0, min(room, MAX_MANIFEST_BYTES))} bytes, the file having {size}"
            raise FormatError(describe("manifest", str(path), must, length, _STEP))
        text, public = file.read(length), file.read(PUBLIC_BYTES)
        _check_signature(path, trust, head + text + public, file.read(SIGNATURE_BYTES))
        manifest = read_manifest(text, str(path))
        payloads = sum(chunk.payload_bytes for _, chunk in manifest.chunks())
        if payloads != room - length:
            must = f"{payloads} bytes of chunks"
            raise FormatError(describe("data", str(path), must, room - length, _STEP))
        identity = "sha256:" + hashlib.sha256(text).hexdigest()
        yield Package(path, manifest, identity, fingerprint(public), file)


def write_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as it is signed."""
    values = manifest.to_dict()
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _check_signature(path: Path, trust: Ed25519PublicKey, signed: bytes, signature: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    trusted = trust.public_bytes(Encoding.Raw, PublicFormat.Raw)
    public = signed[-PUBLIC_BYTES:]
    step = "Do not use it: ask who made it"
    if not any(signature):
        raise VerifyError(describe("signature", str(path), "there", "an unsigned package", step))
    if public != trusted:
        must = f"of the trusted key {fingerprint(trusted)}"
        raise VerifyError(describe("signature", str(path), must, fingerprint(public), step))
    try:
        trust.verify(signature, signed)
    except InvalidSignature as error:
        must = "of what the package says"
        raise VerifyError(describe("signature", str(path), must, "another", _STEP)) from error
