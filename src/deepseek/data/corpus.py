"""Token corpora on the disk: shards of numpy arrays with a checksum each, read in any place.

A corpus is a folder with `corpus.json` and, for each shard, `tokens-00000.npy` (one dimension,
uint16 or uint32) and, where some tokens are only context, `targets-00000.npy` (uint8: 1 where a
token is to be predicted). It is written beside its place and moved there whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deepseek.config import Config
from deepseek.errors import CapacityError, ConfigError, FormatError, describe

CARD = "corpus.json"
SHARD_TOKENS = 1 << 24
"""Tokens of a shard: what writing one holds in memory."""

Part = Literal["tokens", "targets"]


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens that belong together."""

    tokens: Sequence[int]
    targets: Sequence[bool] | None = None
    """Which of them are to be predicted; None for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardCard(Config):
    """What `corpus.json` says of a shard."""

    num_tokens: int
    tokens_sha256: str
    targets_sha256: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusCard(Config):
    """What `corpus.json` holds."""

    name: str
    num_tokens: int
    num_documents: int
    vocab_size: int
    tokenizer_sha256: str
    """Of the tokenizer's JSON: a corpus fits the models of one tokenizer."""
    source_sha256: str = ""
    """Of what it was made from."""
    shards: tuple[ShardCard, ...] = ()


class TokenCorpus:
    """A corpus that is read by windows. Each shard's checksum is compared when it is first read,
    and shards are mapped, so that memory stays bounded.
    """

    def __init__(self, folder: Path, card: CorpusCard) -> None:
        self.folder, self.card = folder, card
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in card.shards)])
        self._open: dict[tuple[int, Part], NDArray[np.unsignedinteger]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> TokenCorpus:
        """Return the corpus in a folder.

        Raises:
            ConfigError: there is no corpus.
            FormatError: its card or the size of a shard is not right.
        """
        folder = Path(folder)
        path = folder / CARD
        if not path.is_file():
            step = "Make one by `deepseek.data.write_corpus`"
            raise ConfigError(
                describe("corpus", "data", f"a folder with {CARD}", str(folder), step)
            )
        try:
            card = CorpusCard.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, "the card of a corpus", str(error)) from error
        corpus = cls(folder, card)
        for number in range(len(card.shards)):
            corpus._map(number, "tokens")
        return corpus

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.card.num_tokens

    @property
    def sha256(self) -> str:
        """The hash of its content: of its shards' checksums."""
        sums = [(shard.tokens_sha256, shard.targets_sha256) for shard in self.card.shards]
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    @property
    def has_targets(self) -> bool:
        """Whether some tokens are only context."""
        return any(shard.targets_sha256 for shard in self.card.shards)

    def read(self, start: int, count: int, part: Part = "tokens") -> NDArray[np.int64]:
        """Return tokens [count], or 1 and 0 for those that are targets.

        Raises:
            FormatError: a shard is not what was written.
        """
        if part == "targets" and not self.has_targets:
            return np.ones(count, np.int64)
        pieces, stop = [], start + count
        for number in range(
            int(np.searchsorted(self._starts, start, "right")) - 1, len(self.card.shards)
        ):
            first = int(self._starts[number])
            if first >= stop:
                break
            values = self._checked(number, part)
            pieces.append(values[max(start - first, 0) : stop - first])
        return np.concatenate(pieces).astype(np.int64)

    def verify(self) -> None:
        """Compare every checksum now.

        Raises:
            FormatError: a shard is not what was written.
        """
        for number in range(len(self.card.shards)):
            self._checked(number, "tokens")
            if self.has_targets:
                self._checked(number, "targets")

    def _checked(self, number: int, part: Part) -> NDArray[np.unsignedinteger]:
        if (number, part) not in self._open:
            path, shard = self._path(number, part), self.card.shards[number]
            expected = shard.tokens_sha256 if part == "tokens" else shard.targets_sha256
            if (found := _sha256_of(path)) != expected:
                raise _damaged(path, f"of SHA-256 {expected}", found)
            self._open[number, part] = self._map(number, part)
        return self._open[number, part]

    def _map(self, number: int, part: Part) -> NDArray[np.unsignedinteger]:
        path, count = self._path(number, part), self.card.shards[number].num_tokens
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, "a numpy array", str(error)) from error
        if values.shape != (count,) or values.dtype.kind != "u":
            raise _damaged(path, f"{count} unsigned integers", f"{values.dtype} {values.shape}")
        return values

    def _path(self, number: int, part: Part) -> Path:
        return self.folder / f"{part}-{number:05d}.npy"


def _damaged(path: Path, must: str, got: str) -> FormatError:
    return FormatError(describe(path.name, str(path.parent), must, got, "Write the corpus again"))


def _sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path, "readable", str(error)) from error


def write_corpus(
    folder: str | Path,
    documents: Iterable[Document],
    *,
    name: str,
    vocab_size: int,
    tokenizer_sha256: str,
    source_sha256: str = "",
    shard_tokens: int = SHARD_TOKENS,
) -> TokenCorpus:
    """Write documents one after another as a corpus, and return it; memory holds one shard.

    Args:
        folder: where it goes; must be new.
        documents: in the order they are kept; what separates them is among their tokens.
        name: what it is called.
        vocab_size: of the tokenizer; every token is below it.
        tokenizer_sha256: which tokenizer.
        source_sha256: what the documents were read from.
        shard_tokens: tokens of a shard.

    Raises:
        ConfigError: the folder is there already, or a document is not of this vocabulary.
        CapacityError: the disk is full; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(
            describe("folder", "write_corpus", "new", str(folder), "Give another one")
        )
    fresh = folder.with_name(f".{folder.name}.new-{os.urandom(4).hex()}")
    try:
        fresh.mkdir(parents=True)
        writer = _Writer(fresh, vocab_size, shard_tokens)
        for document in documents:
            writer.add(document)
        card = CorpusCard(
            name=name,
            num_tokens=sum(shard.num_tokens for shard in writer.finish()),
            num_documents=writer.num_documents,
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            source_sha256=source_sha256,
            shards=tuple(writer.shards),
        )
        (fresh / CARD).write_text(json.dumps(card.to_dict(), indent=1) + "\n", encoding="utf-8")
        fresh.rename(folder)
    except OSError as error:
        step = "Make room, or write it elsewhere"
        got = error.strerror or str(error)
        raise CapacityError(describe("corpus", str(folder), "written", got, step)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return TokenCorpus.open(folder)


class _Writer:
    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        self.num_documents = 0
        self.shards: list[ShardCard] = []
        self._folder, self._vocab_size, self._shard_tokens = folder, vocab_size, shard_tokens
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._tokens: list[NDArray[np.unsignedinteger]] = []
        self._targets: list[NDArray[np.uint8]] = []
        self._pending = 0
        self._has_targets: bool | None = None

    def add(self, document: Document) -> None:
        tokens = np.asarray(document.tokens, np.int64)
        if tokens.size == 0:
            return
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            must = f"tokens from 0 to {self._vocab_size - 1}"
            got = int(tokens.max())
            raise ConfigError(describe(f"document {self.num_documents}", "write_corpus", must, got))
        has_targets = document.targets is not None
        if self._has_targets not in (None, has_targets):
            must = "given for every document or for none"
            raise ConfigError(describe("targets", "write_corpus", must, f"{self.num_documents}"))
        self._has_targets = has_targets
        self.num_documents += 1
        self._tokens.append(tokens.astype(self._dtype))
        if document.targets is not None:
            self._targets.append(np.asarray(document.targets, np.uint8))
        self._pending += tokens.size
        while self._pending >= self._shard_tokens:
            self._write(self._shard_tokens)

    def finish(self) -> list[ShardCard]:
        if self._pending:
            self._write(self._pending)
        if not self.shards:
            raise ConfigError(
                describe("documents", "write_corpus", "at least one token long", "none")
            )
        return self.shards

    def _write(self, count: int) -> None:
        tokens = np.concatenate(self._tokens)
        self._tokens = [tokens[count:]]
        targets_sha256 = None
        if self._has_targets:
            targets = np.concatenate(self._targets)
            self._targets = [targets[count:]]
            targets_sha256 = self._save("targets", targets[:count])
        tokens_sha256 = self._save("tokens", tokens[:count])
        self.shards.append(
            ShardCard(num_tokens=count, tokens_sha256=tokens_sha256, targets_sha256=targets_sha256)
        )
        self._pending -= count

    def _save(self, part: Part, values: NDArray[np.unsignedinteger]) -> str:
        path = self._folder / f"{part}-{len(self.shards):05d}.npy"
        np.save(path, values, allow_pickle=False)
        return _sha256_of(path)
