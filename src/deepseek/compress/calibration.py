"""Samples of text that a compression learns from without training on their labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.config import Config
from deepseek.data import read_texts, text_files
from deepseek.errors import ConfigError, describe
from deepseek.evaluate import default_corpus
from deepseek.models import Decoder, Encoder

PYTHON_TOPICS = "python-topics"
"""The text that every Python carries."""
_LEARNED = 0.8
"""Share of a text, from its start, that may be learned from: gates measure on the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(Config):
    """Which samples, how many and how long."""

    text: str = PYTHON_TOPICS
    """A file or folder of text, or `python-topics`. Samples come from the first four fifths; gates
    measure on the last, so that one text can serve both."""
    samples: int = 128
    length: int = 512
    """Tokens of a sample; an encoder's are whole lines, cut to it."""
    seed: int = 0
    """Of the places in the text."""

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                must = "at least 1"
                raise ConfigError(describe(name, "Calibration", must, getattr(self, name)))


class Batch(NamedTuple):
    """Samples that go through a model together."""

    input_ids: Tensor
    """int64 [B, T]."""
    attention_mask: Tensor | None
    """[B, T], 1 for a token; None where no row is padded."""


def calibration_batches(
    model: Decoder | Encoder, calibration: Calibration, batch_size: int = 8
) -> list[Batch]:
    """Return the samples as a model takes them, the same for the same settings.

    Raises:
        ConfigError: no tokenizer, or too little text.
        FormatError: the text cannot be read.
    """
    if model.tokenizer is None:
        raise ConfigError(describe("tokenizer", "calibration", "there", None))
    texts = [learned_part(text) for text in texts_of(calibration.text)]
    if isinstance(model, Encoder):
        return _lines(model, texts, calibration, batch_size)
    return _windows(model, texts, calibration, batch_size)


def texts_of(source: str) -> list[str]:
    """Return the texts of a file or folder, or the one of `python-topics`.

    Raises:
        ConfigError: there are none.
        FormatError: one cannot be read.
    """
    if source == PYTHON_TOPICS:
        return [default_corpus().text]
    records = read_texts(text_files(Path(source)))
    return [record for record in records if isinstance(record, str)]


def learned_part(text: str) -> str:
    """Return the part of a text that may be learned from, whole lines."""
    return text[: _border(text)]


def measured_part(text: str) -> str:
    """Return the part of a text that is kept to measure on."""
    return text[_border(text) :]


def _border(text: str) -> int:
    return text.find("\n", int(len(text) * _LEARNED)) + 1 or len(text)


def _windows(
    model: Decoder, texts: list[str], calibration: Calibration, batch_size: int
) -> list[Batch]:
    assert model.tokenizer is not None
    ids = torch.tensor([token for text in texts for token in model.tokenizer.encode(text)])
    length = min(calibration.length, model.config.max_positions, len(ids))
    if len(ids) < 2:
        must = "at least two tokens"
        raise ConfigError(describe("text", "calibration", must, calibration.text))
    generator = torch.Generator().manual_seed(calibration.seed)
    last = len(ids) - length
    starts = torch.randint(last + 1, (calibration.samples,), generator=generator)
    rows = torch.stack([ids[start : start + length] for start in starts.tolist()])
    return [Batch(part, None) for part in rows.split(batch_size)]


def _lines(
    model: Encoder, texts: list[str], calibration: Calibration, batch_size: int
) -> list[Batch]:
    assert model.tokenizer is not None
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(describe("text", "calibration", "not empty", calibration.text))
    generator = torch.Generator().manual_seed(calibration.seed)
    order = torch.randperm(len(lines), generator=generator)[: calibration.samples].tolist()
    limit = min(calibration.length, model.config.max_positions)
    encoded = sorted((model.tokenizer.encode(lines[each])[:limit] for each in order), key=len)
    return [
        _padded(encoded[first : first + batch_size], model.config.pad_token_id or 0)
        for first in range(0, len(encoded), batch_size)
    ]


def _padded(rows: list[list[int]], pad: int) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Batch(ids, None if bool(mask.all()) else mask)
