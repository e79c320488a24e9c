"""Texts on the disk to documents of tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek.data.conversations import conversation
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


Record = str | list[dict[str, object]]
"""A text, or the messages of a conversation."""


def read_texts(files: list[Path]) -> Iterator[Record]:
    """Yield the texts: a file is one, and so is each line of a `.jsonl`, under `text`; a line with
    `messages` is a conversation.

    Raises:
        FormatError: a file is not UTF-8, or a line is not an object with a text or messages.
    """
    for file in files:
        if file.suffix != ".jsonl":
            with must_be_utf8(file):
                yield file.read_text(encoding="utf-8")
            continue
        for number, fields in read_lines(file):
            yield _record_of(fields, file, number)


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line of a `.jsonl` file that is not empty.

    Raises:
        FormatError: the file is not UTF-8, or a line is no object.
    """
    with must_be_utf8(file), file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise wrong_line(file, number, "JSON", line.strip()) from error
            if not isinstance(fields, dict):
                raise wrong_line(file, number, "an object", fields)
            yield number, fields


@contextlib.contextmanager
def must_be_utf8(file: Path) -> Iterator[None]:
    """Raise a FormatError that names the file where what is read inside is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise FormatError(
            describe("text", str(file), "UTF-8", str(error), "Convert the file")
        ) from error


def _record_of(fields: dict[str, Any], file: Path, number: int) -> Record:
    if isinstance(fields.get("text"), str):
        return fields["text"]
    messages = fields.get("messages")
    if not isinstance(messages, list):
        must = 'an object with a "text", or with the "messages" of a conversation'
        raise wrong_line(file, number, must, fields)
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise wrong_line(file, number, "messages with a role each", message)
    return messages


def wrong_line(file: Path, number: int, must: str, got: object) -> FormatError:
    """Return the error of a line of a file."""
    return FormatError(describe(f"line {number}", str(file), must, got))


def tokenized(texts: Iterator[Record], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the tokens of each text, with the token behind it that ends a text, where there is
    one; of a conversation those of the model's chat template, the assistant's to be learned."""
    end = tokenizer.eos_token_id
    for text in texts:
        if not isinstance(text, str):
            yield conversation(text, tokenizer)
            continue
        tokens = tokenizer.encode(text, add_special_tokens=False)
        yield Document([*tokens, end] if end is not None else tokens)


def tokenized_lines(texts: Iterator[Record], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the tokens of each line that is not empty, between those with which an encoder's
    tokenizer begins and ends a text.

    Raises:
        ConfigError: there is a conversation.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(describe("data", "an encoder", "lines of text", "a conversation"))
        for line in text.splitlines():
            if line.strip():
                yield Document(tokenizer.encode(line.strip()))


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
