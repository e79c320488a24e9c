"""Text to measure on: what every Python carries, or any file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import platform
import re
from pathlib import Path

from deepseek.errors import ConfigError, FormatError, describe

_UNDERLINE = re.compile(r"^[ \t]*([*=\-~^\"'+#])\1{2,}[ \t]*$\n?", re.MULTILINE)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text with the facts that say which text it was."""

    name: str
    """`python-topics`, a file name, or `text` for a string handed over in Python."""
    text: str
    path: Path | None = None
    """The file it came from."""
    separator: str = "\n\n"
    """What stands between two documents."""
    is_repeatable: bool = True
    """True when another process can get the same text by a command."""

    @property
    def sha256(self) -> str:
        """The hash of the text as UTF-8."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    def conditions(self) -> dict[str, str | int]:
        """Return what a Measurement must say of its text."""
        facts: dict[str, str | int] = {
            "text": self.name,
            "text_sha256": self.sha256,
            "text_characters": len(self.text),
        }
        if self.name == "python-topics":
            facts["python"] = platform.python_version()
        return facts

    def flag(self) -> str | None:
        """Return what `--text` must be given to get this text again; None for the default text."""
        return str(self.path) if self.path is not None else None

    def documents(self, min_characters: int = 2000) -> list[str]:
        """Return the text as separate documents, to be scored apart and resampled.

        Parts between separators are joined until each has `min_characters`; the rest joins the last
        document. Joined again by the separator the documents are the text.
        """
        documents: list[str] = []
        pending: list[str] = []
        size = 0
        for part in self.text.split(self.separator):
            pending.append(part)
            size += len(part) + len(self.separator)
            if size >= min_characters:
                documents.append(self.separator.join(pending))
                pending, size = [], 0
        if pending:
            rest = self.separator.join(pending)
            documents.append(f"{documents.pop()}{self.separator}{rest}" if documents else rest)
        return documents


def default_corpus() -> Corpus:
    """Return the language reference that CPython carries (`pydoc_data.topics`): prose with code.

    Sections that stand in several topics are kept once, since a repeated paragraph is easy to
    predict; lines that only underline a heading are dropped. About 0.37 million characters in
    CPython 3.11. The text differs between versions of Python: compare figures only where
    `text_sha256` is the same.

    Raises:
        ConfigError: this Python comes without `pydoc_data` (some slimmed builds).
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        step = "Give a text file in its place"
        raise ConfigError(
            describe("default text", "this Python", "in pydoc_data.topics", "none", step)
        ) from error
    seen: set[str] = set()
    kept: list[str] = []
    for name in sorted(topics):
        for paragraph in _PARAGRAPH.split(_UNDERLINE.sub("", topics[name])):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n").rstrip())
    return Corpus(name="python-topics", text="\n\n".join(kept) + "\n")


def read_corpus(path: str | Path) -> Corpus:
    """Return a UTF-8 text file as a corpus.

    Raises:
        ConfigError: there is no such file.
        FormatError: the file is empty, binary, or not UTF-8 (the message says at which byte).
    """
    path = Path(path)
    owner = "the text to measure on"
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(describe("file", owner, "there", str(path), "Check the path")) from None
    except IsADirectoryError:
        raise ConfigError(describe("file", owner, "a file, not a folder", str(path))) from None
    except PermissionError:
        raise ConfigError(
            describe("file", owner, "readable", str(path), "Check its permissions")
        ) from None
    if b"\0" in data:
        got = f"{path.name} with a zero byte at offset {data.index(0)}"
        raise FormatError(
            describe("file", owner, "text, not binary", got, "Give a UTF-8 text file")
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{path.name} with byte 0x{data[error.start]:02x} at offset {error.start}"
        raise FormatError(
            describe("file", owner, "UTF-8", got, "Convert it to UTF-8 first")
        ) from None
    if not text.strip():
        got = f"{path.name} ({len(data)} bytes)"
        raise FormatError(
            describe("file", owner, "a text with something in it", got, "Give another file")
        )
    return Corpus(name=path.name, text=text.replace("\r\n", "\n"), path=path)


def as_corpus(text: str | Corpus | None) -> Corpus:
    """Return a string as a corpus, a corpus as it is, and the default corpus for None."""
    if text is None:
        return default_corpus()
    if isinstance(text, Corpus):
        return text
    return Corpus(name="text", text=text, is_repeatable=False)
