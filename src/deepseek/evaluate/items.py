"""Test items: read from a JSONL file, or made from the text that every machine has."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.evaluate.corpus import Corpus, default_corpus

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """A context and several ways to go on, one of them right."""

    context: str
    """What comes before; may be empty."""
    choices: tuple[str, ...]
    """At least two continuations, without the blank that joins them to the context."""
    answer: int
    """Index of the right one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchItem:
    """A prompt and the answer that the model should write."""

    prompt: str
    answer: str


def read_choice_items(path: str | Path) -> list[ChoiceItem]:
    """Return the items of a JSONL file of multiple choice.

    A line is `{"context": str, "choices": [str, ...], "answer": int or str}`.

    `answer` is the index of the right choice, or its text. Other fields are let be; empty lines are
    skipped.

    Raises:
        ConfigError: there is no such file.
        FormatError: a line is not as above; the message names the line.
    """
    return _read(Path(path), _choice_item)


def read_match_items(path: str | Path) -> list[MatchItem]:
    """Return the items of a JSONL file with `{"prompt": str, "answer": str}` a line.

    Other fields are let be; empty lines are skipped.

    Raises:
        ConfigError: there is no such file.
        FormatError: a line is not as above; the message names the line.
    """
    return _read(Path(path), _match_item)


def next_sentence_items(
    num_items: int = 100, *, corpus: Corpus | None = None, num_choices: int = 4, seed: int = 0
) -> list[ChoiceItem]:
    """Return items that ask which sentence really follows; the others stand elsewhere.

    Args:
        num_items: how many.
        corpus: None = the default corpus.
        num_choices: at least 2.
        seed: the same seed and text give the same items.

    Raises:
        ConfigError: the text has too few sentences.
    """
    corpus = default_corpus() if corpus is None else corpus
    pairs = [
        (context, following)
        for paragraph in re.split(r"\n\s*\n", corpus.text)
        for context, following in _sentence_pairs(paragraph)
    ]
    if len(pairs) < max(num_items, 2 * num_choices):
        must = f"long enough for {max(num_items, 2 * num_choices)} pairs of sentences"
        raise ConfigError(describe("corpus", "next_sentence_items", must, f"{len(pairs)} pairs"))
    chance = random.Random(seed)
    items = []
    for context, following in chance.sample(pairs, num_items):
        others = [
            sentence
            for _, sentence in chance.sample(pairs, 2 * num_choices)
            if sentence != following
        ]
        answer = chance.randrange(num_choices)
        choices = others[: num_choices - 1]
        choices.insert(answer, following)
        items.append(ChoiceItem(context=context, choices=tuple(choices), answer=answer))
    return items


def addition_items(
    num_items: int = 100, *, num_examples: int = 4, seed: int = 0
) -> list[MatchItem]:
    """Return sums of two numbers below ten, each after some solved examples.

    Args:
        num_items: how many.
        num_examples: solved sums before each.
        seed: the same seed gives the same items.
    """
    chance = random.Random(seed)
    items = []
    for _ in range(num_items):
        sums = [(chance.randint(1, 9), chance.randint(1, 9)) for _ in range(num_examples + 1)]
        lines = [f"{left} + {right} = {left + right}" for left, right in sums[:-1]]
        left, right = sums[-1]
        prompt = "\n".join([*lines, f"{left} + {right} ="])
        items.append(MatchItem(prompt=prompt, answer=str(left + right)))
    return items


def items_hash(items: Sequence[ChoiceItem] | Sequence[MatchItem]) -> str:
    """Return the sha256 of some items, whatever file or seed they came from."""
    lines = [json.dumps(dataclasses.asdict(item), sort_keys=True) for item in items]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def _sentence_pairs(paragraph: str) -> list[tuple[str, str]]:
    """Return each plain sentence of a paragraph with the one after it."""
    if paragraph.startswith(" "):
        return []
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))
    plain = [sentence for sentence in sentences if 30 <= len(sentence) <= 300]
    if len(plain) != len(sentences):
        return []
    return list(itertools.pairwise(plain))


def _read(path: Path, parse: Callable[[Mapping[str, object], str], Item]) -> list[Item]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            describe("file", "the items", "there", str(path), "Check the path")
        ) from None
    except UnicodeDecodeError as error:
        got = f"{path.name} with byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise FormatError(describe("file", "the items", "UTF-8", got)) from None
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise FormatError(
                describe("content", where, "one JSON object", line, f"{error}")
            ) from None
        if not isinstance(values, dict):
            raise FormatError(describe("content", where, "one JSON object", values))
        items.append(parse(values, where))
    if not items:
        raise FormatError(
            describe("file", "the items", "a JSONL file with at least one item", path.name)
        )
    return items


def _choice_item(values: Mapping[str, object], where: str) -> ChoiceItem:
    choices = values.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise FormatError(
            describe("choices", where, "a list of at least two texts, none empty", choices)
        )
    answer = values.get("answer")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        must = f"0 to {len(choices) - 1}, the index of the right choice, or its text"
        raise FormatError(describe("answer", where, must, answer))
    return ChoiceItem(
        context=_text(values, "context", where), choices=tuple(choices), answer=answer
    )


def _match_item(values: Mapping[str, object], where: str) -> MatchItem:
    return MatchItem(prompt=_text(values, "prompt", where), answer=_text(values, "answer", where))


def _text(values: Mapping[str, object], name: str, where: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise FormatError(describe(name, where, "a text", value))
    return value
