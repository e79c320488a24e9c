"""A stage's data, opened; texts are tokenised once and kept in the run's folder."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from deepseek.data import (
    Document,
    TokenCorpus,
    Tokenizer,
    Windows,
    one_a_row,
    packed,
    read_texts,
    text_files,
    tokenized,
    write_corpus,
)
from deepseek.data.corpus import CARD
from deepseek.data.texts import Record, texts_sha256, tokenized_lines, tokenizer_sha256
from deepseek.errors import ConfigError, describe
from deepseek.evaluate import default_corpus
from deepseek.hub.atomic import replace_file
from deepseek.hub.store import safe_name
from deepseek.models import Decoder, Encoder
from deepseek.parallel import World
from deepseek.train.config import PYTHON_TOPICS, TEACHER_TEXT, Run, Source, Stage
from deepseek.train.places import Places
from deepseek.train.teacher import write_texts


@dataclasses.dataclass(frozen=True)
class Opener:
    """Opens the data of a run's stages."""

    run: Run
    places: Places
    world: World
    tokenizer: Tokenizer
    vocab_size: int
    is_by_line: bool = False
    """A sample is a line of text, as an encoder takes it."""
    teacher: Decoder | None = None
    goes_on: Callable[[], None] = lambda: None
    """Called between pieces of long work; raises where it is to stop."""
    report: Callable[[str, float], None] = lambda words, share: None
    """Told of long work before the first step: what, and the share that is done."""

    @classmethod
    def of(cls, run: Run, model: Decoder | Encoder, places: Places, world: World) -> Opener:
        """Return one for the data of a model.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        if model.tokenizer is None:
            step = "Take a bundle with a tokenizer"
            raise ConfigError(describe("tokenizer", "the model", "there", None, step))
        size, is_by_line = model.config.vocab_size, isinstance(model, Encoder)
        return cls(run, places, world, model.tokenizer, size, is_by_line)

    def open(self, number: int) -> Windows:
        """Return the data of a stage; the first worker tokenises what is not yet, the others wait.

        Raises:
            ConfigError: a source is not there, was made with another tokenizer, or is not what the
                stage began with.
            FormatError: a source is damaged.
        """
        stage = self.run.stages[number]
        if self.world.is_first:
            for source in stage.data:
                self._open(source, stage)
        self.world.barrier()
        corpora = [self._open(source, stage) for source in stage.data]
        if self.world.is_first:
            _check_same_data(stage.name, corpora, self.places)
        seed = self.run.seed + 104_729 * number
        return Windows(corpora, length=stage.length, weights=stage.weights, seed=seed)

    def _open(self, source: Source, stage: Stage) -> TokenCorpus:
        known = tokenizer_sha256(self.tokenizer)
        folder = Path(source.path)
        if source.path in (PYTHON_TOPICS, TEACHER_TEXT) or not (folder / CARD).is_file():
            folder = self._tokenised(source, stage, known)
        corpus = TokenCorpus.open(folder)
        if corpus.card.tokenizer_sha256 != known:
            must, got = "tokens of the model's tokenizer", "those of another"
            raise ConfigError(describe("data", source.path, must, got, "Tokenise the text again"))
        return corpus

    def _tokenised(self, source: Source, stage: Stage, tokenizer_hash: str) -> Path:
        """Return the corpus of a text, made where it is not there yet."""
        documents, text_hash = self._documents(source)
        key_of = [text_hash, tokenizer_hash]
        first = next(iter(documents), None)
        documents = itertools.chain([] if first is None else [first], documents)
        fill = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        if self.is_by_line:
            key_of.append(f"lines {stage.length}")
            documents = one_a_row(documents, stage.length, fill)
        elif first is not None and first.targets is not None:
            # conversations are kept whole, so their rows depend on the length
            key_of.append(str(stage.length))
            documents = packed(documents, stage.length, fill)
        key = hashlib.sha256(" ".join(key_of).encode()).hexdigest()[:12]
        folder = self.places.data / f"{safe_name(Path(source.path).name)}-{key}"
        if not folder.is_dir():
            write_corpus(
                folder,
                documents,
                name=Path(source.path).name,
                vocab_size=self.vocab_size,
                tokenizer_sha256=tokenizer_hash,
                source_sha256=text_hash,
            )
        return folder

    def _documents(self, source: Source) -> tuple[Iterable[Document], str]:
        """Return the documents of a text, and its hash."""
        if source.path == TEACHER_TEXT:
            return self._written(source)
        if source.path == PYTHON_TOPICS:
            corpus = default_corpus()
            return self._tokens_of(iter(corpus.documents())), corpus.sha256
        files = text_files(Path(source.path))
        return self._tokens_of(read_texts(files)), texts_sha256(files)

    def _tokens_of(self, texts: Iterator[Record]) -> Iterator[Document]:
        return (tokenized_lines if self.is_by_line else tokenized)(texts, self.tokenizer)

    def _written(self, source: Source) -> tuple[Iterable[Document], str]:
        assert source.num_tokens is not None
        if self.is_by_line:
            must = "text that is there: an encoder writes none"
            raise ConfigError(describe("data", "the run", must, source.path))
        teacher = self.run.teacher or self.run.model
        parts = f"{teacher} {source.num_tokens} {self.run.seed}"
        text_hash = hashlib.sha256(parts.encode()).hexdigest()
        path = self.places.data / f"{TEACHER_TEXT}-{text_hash[:12]}.jsonl"
        documents = write_texts(
            self.teacher,
            path,
            num_tokens=source.num_tokens,
            seed=self.run.seed,
            goes_on=self.goes_on,
            report=self.report,
        )
        return documents, text_hash


def _check_same_data(stage: str, corpora: Sequence[TokenCorpus], places: Places) -> None:
    """Note which data a stage begins with, and refuse to go on with other data."""
    path = places.data_card
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    hashes = [corpus.sha256 for corpus in corpora]
    if stage not in known:
        replace_file(path, json.dumps({**known, stage: hashes}, indent=1).encode() + b"\n")
    elif known[stage] != hashes:
        step = "Give the old data back, or another --out"
        must = "what the stage began with"
        raise ConfigError(describe("data", f"stage {stage!r}", must, "other content", step))
