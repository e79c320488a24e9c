"""Exact match of a greedy answer, in the sense of the LM Evaluation Harness (`generate_until`)."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import (
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    max_positions_of,
    model_conditions,
    repeat_command,
    tokenizer_of,
)
from deepseek.evaluate.choice import DEFAULT_LENGTH, harness_encode
from deepseek.evaluate.continuation import greedy_continuation
from deepseek.evaluate.intervals import wilson
from deepseek.evaluate.items import MatchItem, items_hash
from deepseek.records import Measurement

NO_MATCH = "[invalid]"


@dataclasses.dataclass(frozen=True)
class Answered:
    """One item with what the model wrote."""

    text: str
    """As written, cut at the first stop string."""
    extracted: str
    """What the filter made of it."""
    answer: str
    is_right: bool


@dataclasses.dataclass(frozen=True)
class ExactMatchResult:
    """What `exact_match` found."""

    measurements: list[Measurement]
    """`exact_match`."""
    items: tuple[Answered, ...]


def exact_match(
    model: CausalModel,
    items: Sequence[MatchItem],
    *,
    tokenizer: TextTokenizer | None = None,
    until: Sequence[str] = ("\n",),
    max_gen_toks: int = 32,
    pattern: str | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    flags: Mapping[str, str | int | None] | None = None,
    progress: Progress | None = None,
) -> ExactMatchResult:
    """Measure how often the answer that a model writes greedily is the right one.

    Args:
        model: see `base.CausalModel`.
        items: at least one.
        tokenizer: None = the model's own.
        until: strings that end an answer and are not part of it; the end-of-text token always ends
            it.
        max_gen_toks: most tokens of an answer; prompts are cut from the left to leave room for
            them.
        pattern: regular expression that picks the answer out of the text, the first group of the
            first match (the whole match without groups), `[invalid]` when nothing matches; None =
            the text without outer blanks.
        ignore_case: compare in lower case.
        ignore_punctuation: compare without ASCII punctuation.
        flags: options of the command line that give these items again; None = there are none.
        progress: called after each item.

    Returns:
        `exact_match` with a Wilson interval over the items; and every item.

    Raises:
        ConfigError: no items, no tokenizer, a pattern that is no regular expression, or no room for
            a prompt.

    Source: EleutherAI/lm-evaluation-harness 0.4.13, `models/huggingface.py` (`generate_until`),
    `filters/extraction.py` (`regex` and `remove_whitespace`) and `api/metrics.py` (`exact_match`).
    """
    tokenizer = tokenizer_of(model, tokenizer, "exact_match")
    if not items:
        raise ConfigError(describe("items", "exact_match", "at least one", list(items)))
    regex = _compiled(pattern)
    room = (max_positions_of(model) or DEFAULT_LENGTH) - max_gen_toks
    if room < 1:
        must = f"below the model's length of {room + max_gen_toks}"
        raise ConfigError(describe("max_gen_toks", "exact_match", must, max_gen_toks))
    answered = []
    for number, item in enumerate(items, start=1):
        ids = harness_encode(tokenizer, item.prompt)[-room:]
        text = greedy_continuation(model, tokenizer, ids, max_tokens=max_gen_toks, until=until)
        extracted = extract(text, regex)
        same = _plain(extracted, ignore_case, ignore_punctuation) == _plain(
            item.answer, ignore_case, ignore_punctuation
        )
        answered.append(Answered(text, extracted, item.answer, same))
        if progress is not None:
            progress("exact match", number / len(items))
    conditions: dict[str, Condition] = {
        **model_conditions(model),
        "items": len(items),
        "items_sha256": items_hash(items),
        "until": repr(list(until)),
    }
    conditions |= {
        "max_gen_toks": max_gen_toks,
        "pattern": pattern,
        "interval": "Wilson over items",
    }
    options = {**(flags or {}), "pattern": pattern, "max_gen_toks": max_gen_toks}
    usual = tuple(until) == ("\n",) and not (ignore_case or ignore_punctuation)
    repeatable = flags is not None and usual
    command = repeat_command(model, "match", options, repeatable=repeatable)
    return ExactMatchResult([_measurement(answered, conditions, command)], tuple(answered))


def extract(text: str, regex: re.Pattern[str] | None) -> str:
    """Return the part of an answer that is compared: see `pattern` of `exact_match`."""
    if regex is None:
        return text.strip()
    matches = regex.findall(text)
    if not matches:
        return NO_MATCH
    first = matches[0]
    if isinstance(first, tuple):
        first = next((group for group in first if group), NO_MATCH)
    return first.strip()


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        must = "a regular expression"
        raise ConfigError(describe("pattern", "exact_match", must, pattern, f"{error}")) from None


def _plain(text: str, ignore_case: bool, ignore_punctuation: bool) -> str:
    text = text.lower() if ignore_case else text
    return text.translate(str.maketrans("", "", string.punctuation)) if ignore_punctuation else text


def _measurement(
    answered: Sequence[Answered], conditions: dict[str, Condition], command: str
) -> Measurement:
    count = sum(item.is_right for item in answered)
    return Measurement(
        name="exact_match",
        value=count / len(answered),
        unit="1",
        spread=wilson(count, len(answered)),
        conditions=conditions,
        command=command,
    )
