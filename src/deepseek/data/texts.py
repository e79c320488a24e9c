"""Texts on the disk to documents of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from deepseek.data.corpus import Document
from deepseek.data.tokenizer import Tokenizer
from deepseek.errors import ConfigError, FormatError, describe

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")


def text_files(path: Path) -> list[Path]:
    """Return the files of text at a place: the file itself, or those in a folder, sorted.

    Raises:
        ConfigError: there are none.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in files if file.is_file() and file.suffix in SUFFIXES]
    if not files:
        must = f"a corpus, or a file or folder of {', '.join(SUFFIXES)}"
        raise ConfigError(describe("data", "train", must, str(path)))
    return files


def read_texts(files: list[Path]) -> Iterator[str]:
    """Yield the texts: a file is one, and so is each line of a `.jsonl`, under `text`.

    Raises:
        FormatError: a file is not UTF-8, or a line is not an object with a text.
    """
    for file in files:
        try:
            if file.suffix != ".jsonl":
                yield file.read_text(encoding="utf-8")
                continue
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _text_of(line, file, number)
        except UnicodeDecodeError as error:
            raise FormatError(
                describe("text", str(file), "UTF-8", str(error), "Convert the file")
            ) from error


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        must = 'an object with "text"'
        raise FormatError(describe(f"line {number}", str(file), must, line.strip())) from error
    if not isinstance(text, str):
        raise FormatError(describe(f'"text" of line {number}', str(file), "a string", text))
    return text


def tokenized(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the tokens of each text, with the token behind it that ends a text, where there is
    one."""
    end = tokenizer.eos_token_id
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        yield Document([*tokens, end] if end is not None else tokens)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return the hash by which corpora and models know whether they fit each other."""
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()


def texts_sha256(files: list[Path]) -> str:
    """Return the hash of the files' content, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
