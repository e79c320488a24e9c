"""Where bundles and downloads live on this machine, and which of them a name means."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from deepseek.errors import ConfigError, describe
from deepseek.hub.atomic import recover
from deepseek.hub.names import NAMES, canonical_name

CARD = "bundle.json"


def store_folder() -> Path:
    """Return the folder of the store: `$DEEPSEEK_HOME`, or `~/.cache/deepseek`."""
    named = os.environ.get("DEEPSEEK_HOME")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "deepseek"


def bundle_folder(name: str) -> Path:
    """Return where the store keeps the bundle of this name, whether it is there or not."""
    return store_folder() / "bundles" / name


def downloads_folder() -> Path:
    """Return where the store keeps what it fetched."""
    return store_folder() / "downloads"


def stored_names() -> Iterator[str]:
    """Yield the names of the bundles in the store, sorted."""
    folder = store_folder() / "bundles"
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and (path / CARD).is_file():
                yield path.name


def safe_name(text: str) -> str:
    """Return a text as one file name: `HuggingFaceTB/SmolLM2` gives `HuggingFaceTB--SmolLM2`."""
    return (
        re.sub(r"[^A-Za-z0-9._-]+", "-", text.strip("/").replace("/", "--")).strip(".-") or "model"
    )


def resolve(name_or_folder: str | Path) -> Path:
    """Return the folder or GGUF file that a name means on this machine; nothing is fetched.

    A path that holds a model comes first, then the names of the store.

    Raises:
        ConfigError: there is no such model here; the message says what can be pulled.
    """
    path = Path(name_or_folder)
    recover(path)
    if (path / "config.json").is_file() or (path / CARD).is_file():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            must = "a model folder or a .gguf file"
            raise ConfigError(describe("file", "load", must, str(path)))
        return path
    text = str(name_or_folder)
    name = canonical_name(text)
    for folder in (bundle_folder(safe_name(name)), bundle_folder(safe_name(_bare(text)))):
        recover(folder)
        if (folder / CARD).is_file():
            return folder
    if path.is_dir():
        must = "a model folder, with config.json"
        raise ConfigError(describe("folder", "load", must, str(path), "Give the folder of a model"))
    if name in NAMES or text.startswith(("pypi:", "hf:")):
        step = f"Run: deepseek pull {text}"
        raise ConfigError(describe("model", "load", "pulled first", text, step))
    known = [*NAMES, *stored_names()]
    near = difflib.get_close_matches(text, known, n=1)
    step = f"Did you mean {near[0]!r}" if near else f"Names that can be pulled: {', '.join(NAMES)}"
    raise ConfigError(
        describe("model", "load", "a known name, a folder or a .gguf file", text, step)
    )


def _bare(text: str) -> str:
    """Return a source without its scheme and version: what its bundle is called in the store."""
    return text.removeprefix("pypi:").removeprefix("hf:").partition("==")[0]
