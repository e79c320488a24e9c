"""A stage's data, opened; texts are tokenised once and kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek.data import TokenCorpus, Windows, read_texts, text_files, tokenized, write_corpus
from deepseek.data.corpus import CARD
from deepseek.data.texts import texts_sha256, tokenizer_sha256
from deepseek.data.tokenizer import Tokenizer
from deepseek.errors import ConfigError, describe
from deepseek.evaluate import default_corpus
from deepseek.hub.atomic import replace_file
from deepseek.hub.store import safe_name
from deepseek.models import Decoder
from deepseek.parallel import World
from deepseek.train.config import PYTHON_TOPICS, Run, Source
from deepseek.train.places import Places


def open_windows(run: Run, number: int, model: Decoder, places: Places, world: World) -> Windows:
    """Return the data of a stage; the first worker tokenises what is not yet, the others wait.

    Raises:
        ConfigError: a source is not there, was made with another tokenizer, or is not what the
            stage began with.
        FormatError: a source is damaged.
    """
    stage = run.stages[number]
    tokenizer = model.tokenizer
    if tokenizer is None:
        step = "Take a bundle with a tokenizer"
        raise ConfigError(describe("tokenizer", "the model", "there", None, step))
    if world.is_first:
        for source in stage.data:
            _open(source, tokenizer, model, places)
    world.barrier()
    corpora = [_open(source, tokenizer, model, places) for source in stage.data]
    if world.is_first:
        _check_same_data(stage.name, corpora, places)
    return Windows(
        corpora, length=stage.length, weights=stage.weights, seed=run.seed + 104_729 * number
    )


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


def _open(source: Source, tokenizer: Tokenizer, model: Decoder, places: Places) -> TokenCorpus:
    known = tokenizer_sha256(tokenizer)
    folder = Path(source.path)
    if source.path == PYTHON_TOPICS or not (folder / CARD).is_file():
        folder = _tokenised(source.path, tokenizer, known, model.config.vocab_size, places)
    corpus = TokenCorpus.open(folder)
    if corpus.card.tokenizer_sha256 != known:
        must, got = "tokens of the model's tokenizer", "those of another"
        raise ConfigError(describe("data", source.path, must, got, "Tokenise the text again"))
    return corpus


def _tokenised(
    path: str, tokenizer: Tokenizer, tokenizer_hash: str, vocab_size: int, places: Places
) -> Path:
    """Return the corpus of a text, made where it is not there yet."""
    texts: Iterator[str]
    if path == PYTHON_TOPICS:
        corpus = default_corpus()
        texts, text_hash = iter(corpus.documents()), corpus.sha256
    else:
        files = text_files(Path(path))
        texts, text_hash = read_texts(files), texts_sha256(files)
    key = hashlib.sha256(f"{text_hash} {tokenizer_hash}".encode()).hexdigest()[:12]
    folder = places.data / f"{safe_name(Path(path).name)}-{key}"
    if not folder.is_dir():
        write_corpus(
            folder,
            tokenized(texts, tokenizer),
            name=Path(path).name,
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_hash,
            source_sha256=text_hash,
        )
    return folder
