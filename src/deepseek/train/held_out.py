"""What is kept back of the data, and how well a model predicts it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek.data import conversation, read_texts, text_files
from deepseek.data.texts import Record
from deepseek.errors import ConfigError, describe
from deepseek.evaluate import default_corpus, perplexity, read_corpus
from deepseek.hub.atomic import replace_file
from deepseek.models import Decoder, Encoder
from deepseek.ops.cross_entropy import IGNORED
from deepseek.records import Measurement
from deepseek.train.config import PYTHON_TOPICS

_SHARE = 0.05
_MOST_CONVERSATIONS = 200
_MAX_TOKENS = 8192


def split_texts(path: Path, into: Path) -> tuple[Path, Path]:
    """Write what is learned of some data and what is kept back, the last twentieth, into a folder;
    return the two files.

    Conversations and lines of a `.jsonl` are kept whole. Texts are cut at the end of a line.

    Args:
        path: a file or folder of texts, or of conversations.
        into: where the files go.

    Raises:
        ConfigError: there is too little, or both texts and conversations.
        FormatError: the data cannot be read.
    """
    records = list(read_texts(text_files(path)))
    kinds = {isinstance(record, str) for record in records}
    if len(kinds) != 1:
        must = "texts, or conversations"
        raise ConfigError(describe("data", str(path), must, "both" if kinds else "nothing"))
    cut = math.ceil(len(records) * (1 - _SHARE))
    learned, kept = records[:cut], records[cut:]
    if len(records) < 2 / _SHARE and kinds == {True}:
        learned, kept = _cut_text("\n\n".join(str(record) for record in records))
    if not learned or not kept:
        must = "some lines of text" if kinds == {True} else "at least two conversations"
        step = "Give more, or a file of its own to measure on by --held-out"
        raise ConfigError(describe("data", str(path), must, records, step))
    if isinstance(kept[0], str):
        return (
            _write_lines(into / "learned.jsonl", learned),
            _write_text(into / "held-out.txt", kept),
        )
    return (
        _write_lines(into / "learned.jsonl", learned),
        _write_lines(into / "held-out.jsonl", kept[:_MOST_CONVERSATIONS]),
    )


def _cut_text(text: str) -> tuple[list[Record], list[Record]]:
    place = text.find("\n", int(len(text) * (1 - _SHARE))) + 1
    parts = text[:place], text[place:]
    if not all(part.strip() for part in parts):
        return [], []
    return [parts[0]], [parts[1]]


def _write_lines(path: Path, records: list[Record]) -> Path:
    lines = [
        json.dumps({"text" if isinstance(each, str) else "messages": each}, ensure_ascii=False)
        for each in records
    ]
    return _write(path, "".join(f"{line}\n" for line in lines))


def _write_text(path: Path, records: list[Record]) -> Path:
    return _write(path, "\n\n".join(str(each) for each in records))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())
    return path


def measure_on(
    model: Decoder | Encoder,
    text: str,
    report: Callable[[str, float], None] = lambda words, share: None,
) -> list[Measurement]:
    """Return the perplexity of a text, or that of the answers in a file of conversations.

    Args:
        model: in evaluation mode.
        text: a file, or `python-topics`.
        report: told what is done, and the share.

    Raises:
        ConfigError: it is no decoder.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(describe("model", "perplexity", "a decoder", type(model).__name__))
    name = Path(text).name
    if Path(text).suffix == ".jsonl":
        return [_answer_perplexity(model, Path(text))]
    corpus = default_corpus() if text == PYTHON_TOPICS else read_corpus(text)
    found = perplexity(
        model,
        corpus,
        max_tokens=_MAX_TOKENS,
        progress=lambda _, share: report(f"measuring on {name}", share or 0.0),
    )
    return list(found.measurements)


def _answer_perplexity(model: Decoder, path: Path) -> Measurement:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    total, count, conversations = 0.0, 0, 0
    for record in read_texts([path]):
        if isinstance(record, str):
            must = "conversations, as the file ends in .jsonl"
            raise ConfigError(describe("text to measure on", str(path), must, "a text"))
        document = conversation(record, tokenizer)
        tokens = torch.tensor([document.tokens])[:, : model.config.max_positions]
        is_answer = torch.tensor([document.targets])[:, : model.config.max_positions]
        labels = torch.where(is_answer, tokens, IGNORED)
        answered = int((labels[:, 1:] != IGNORED).sum())
        if answered:
            with torch.no_grad():
                total += model.loss(tokens, labels).item() * answered
            count += answered
        conversations += 1
    if count == 0:
        raise ConfigError(describe("data", str(path), "conversations with answers", "none"))
    return Measurement(
        name="answer_perplexity",
        value=math.exp(total / count),
        unit="1",
        conditions={"text": path.name, "conversations": conversations, "tokens": count},
    )
