"""Retrieval from a long context: a needle in a haystack, and copying an earlier passage.

Both judge a model by teacher forcing, see `probes.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import (
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    model_conditions,
    repeat_command,
    tokenizer_of,
)
from deepseek.evaluate.corpus import Corpus, as_corpus
from deepseek.evaluate.intervals import bootstrap_ratio, wilson
from deepseek.evaluate.probes import (
    BOOTSTRAP,
    Haystack,
    Probe,
    ProbeScore,
    RetrievalResult,
    answer_log_likelihood,
    score_probes,
    token_accuracy,
)
from deepseek.records import Measurement

_INTRODUCTION = (
    "{some} special magic {number} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_NEEDLE = " One of the special magic numbers for {key} is: {value}."
_QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
_ADJECTIVES = ("amber", "brave", "calm", "deep", "early", "faint", "gentle", "hollow", "keen")
_NOUNS = ("anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "lamp")
_KEYS = tuple(f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS)


def needle(
    model: CausalModel,
    *,
    length: int,
    depth: float | None = None,
    num_keys: int = 1,
    num_items: int = 20,
    text: str | Corpus | None = None,
    tokenizer: TextTokenizer | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RetrievalResult:
    """Measure whether a model finds a number that was hidden in a long text.

    Args:
        model: see `base.CausalModel`.
        length: tokens of the whole sequence, question and answer included; exact.
        depth: place of the needle, 0 (begin) to 1 (end of the text); None = evenly over the
            items. It stands after the nearest end of a sentence.
        num_keys: numbers hidden; one is asked for, the others mislead (at other places).
        num_items: sequences, each with its own numbers and its own piece of the text.
        text: the haystack; None = the default corpus. At least `length` tokens.
        tokenizer: None = the model's own.
        seed: of the numbers, the pieces and the bootstrap.
        progress: called after each item.

    Returns:
        `needle_accuracy` (greedy decoding writes all digits; Wilson over items),
        `needle_log_likelihood` (of the answer, a token; bootstrap over items) and `needle_rank`
        (mean over items of the worst rank among the answer's tokens; 0 is perfect).

    Raises:
        ConfigError: the text is shorter than `length`, or `length` has no room for the question.

    Source: tasks niah_single_2 (one key) and niah_multikey_1 (several) of NVIDIA/RULER,
    `scripts/data/synthetic/niah.py`; the generator is our own. Deviations: the haystack is the
    given text; pieces are joined as tokens, so that lengths are exact; scored by teacher forcing.
    """
    tokenizer = tokenizer_of(model, tokenizer, "needle")
    corpus = as_corpus(text)
    _check_needle(depth, num_keys, num_items)
    haystack = Haystack(tokenizer, corpus)
    chance = random.Random(seed)
    probes = []
    for number in range(num_items):
        place = depth if depth is not None else (number + 0.5) / num_items
        probes.append(_needle_probe(tokenizer, haystack, length, place, num_keys, chance))
    scores = score_probes(model, probes, "needle", progress)
    conditions: dict[str, Condition] = {**model_conditions(model), **corpus.conditions()}
    conditions |= {"length": length, "depth": depth, "keys": num_keys, "items": num_items}
    flags = {"lengths": length, "depths": depth, "num_keys": num_keys, "num_items": num_items}
    flags |= {"text": corpus.flag(), "seed": seed}
    command = repeat_command(model, "needle", flags, repeatable=corpus.is_repeatable)
    measurements = _needle_measurements(scores, seed, {**conditions, "seed": seed}, command)
    return RetrievalResult(measurements, tuple(scores))


def copy_accuracy(
    model: CausalModel,
    *,
    length: int,
    distance: int | None = None,
    num_passage_tokens: int = 128,
    num_cue_tokens: int = 8,
    num_items: int = 8,
    text: str | Corpus | None = None,
    tokenizer: TextTokenizer | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RetrievalResult:
    """Measure how well a model repeats a passage that it has seen earlier in the sequence.

    A piece of the text is followed by a passage out of that piece. Perplexity of a document
    hardly shows what is lost with a narrow view; this does.

    Args:
        model: see `base.CausalModel`.
        length: tokens of the whole sequence; exact.
        distance: tokens from the passage to its repeat; None = as far as the length allows.
        num_passage_tokens: length of the passage.
        num_cue_tokens: first tokens of the repeat that are shown and not scored: before them
            nobody can know that, and what, is being repeated.
        num_items: sequences, each a different piece of the text.
        text: None = the default corpus. At least `length` tokens.
        tokenizer: None = the model's own.
        seed: of the pieces and the bootstrap.
        progress: called after each item.

    Returns:
        `copy_perplexity` (bootstrap over items) and `copy_accuracy` (share of tokens that greedy
        decoding would write; Wilson over items as clusters).

    Raises:
        ConfigError: the text is shorter than `length`, or passage and distance do not fit in it.
    """
    tokenizer = tokenizer_of(model, tokenizer, "copy_accuracy")
    corpus = as_corpus(text)
    distance = length - num_passage_tokens if distance is None else distance
    _check_copy(length, distance, num_passage_tokens, num_cue_tokens, num_items)
    haystack = Haystack(tokenizer, corpus)
    chance = random.Random(seed)
    probes = []
    for _ in range(num_items):
        piece = haystack.piece(length - num_passage_tokens, chance)
        begin = len(piece) - distance
        ids = piece + piece[begin : begin + num_passage_tokens]
        probes.append(Probe(ids=tuple(ids), num_scored=num_passage_tokens - num_cue_tokens))
    scores = score_probes(model, probes, "copy", progress)
    conditions: dict[str, Condition] = {**model_conditions(model), **corpus.conditions()}
    conditions |= {"length": length, "distance": distance, "items": num_items, "seed": seed}
    conditions |= {"passage_tokens": num_passage_tokens, "cue_tokens": num_cue_tokens}
    flags = {"lengths": length, "distance": distance, "num_items": num_items}
    flags |= {"text": corpus.flag(), "seed": seed}
    usual = (num_passage_tokens, num_cue_tokens) == (128, 8)
    command = repeat_command(model, "copy", flags, repeatable=corpus.is_repeatable and usual)
    return RetrievalResult(_copy_measurements(scores, seed, conditions, command), tuple(scores))


def _needle_probe(
    tokenizer: TextTokenizer,
    haystack: Haystack,
    length: int,
    depth: float,
    num_keys: int,
    chance: random.Random,
) -> Probe:
    keys = chance.sample(_KEYS, num_keys)
    values = [str(number) for number in chance.sample(range(10**6, 10**7), num_keys)]
    words = ("Some", "numbers are", "numbers") if num_keys > 1 else ("A", "number is", "number")
    some, number, kind = words
    intro = tokenizer.encode(_INTRODUCTION.format(some=some, number=number, kind=kind))
    question = tokenizer.encode(_QUESTION.format(key=keys[0]), add_special_tokens=False)
    answer = tokenizer.encode(f" {values[0]}", add_special_tokens=False)
    needles = [
        tokenizer.encode(_NEEDLE.format(key=key, value=value), add_special_tokens=False)
        for key, value in zip(keys, values, strict=True)
    ]
    room = length - len(intro) - len(question) - len(answer) - sum(map(len, needles))
    if room < 0:
        must = f"at least {length - room} tokens, to hold needles, question and answer"
        raise ConfigError(describe("length", "needle", must, length))
    piece = haystack.piece(room, chance)
    depths = [depth, *(chance.random() for _ in needles[1:])]
    body = haystack.hide(piece, list(zip(depths, needles, strict=True)))
    ids = (*intro, *body, *question, *answer)
    return Probe(ids=ids, num_scored=len(answer))


def _check_needle(depth: float | None, num_keys: int, num_items: int) -> None:
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(describe("depth", "needle", "0 (begin) to 1 (end)", depth))
    if not 1 <= num_keys <= len(_KEYS):
        raise ConfigError(describe("num_keys", "needle", f"1 to {len(_KEYS)}", num_keys))
    if num_items < 1:
        raise ConfigError(describe("num_items", "needle", "at least 1", num_items))


def _check_copy(length: int, distance: int, passage: int, cue: int, num_items: int) -> None:
    owner = "copy_accuracy"
    if not 1 <= cue < passage:
        must = f"1 to {passage - 1}, below the passage's length"
        raise ConfigError(describe("num_cue_tokens", owner, must, cue))
    if length < 2 * passage:
        must = f"at least {2 * passage}, to hold the passage twice"
        raise ConfigError(describe("length", owner, must, length))
    if not passage <= distance <= length - passage:
        must = f"{passage} to {length - passage} at length {length}"
        raise ConfigError(describe("distance", owner, must, distance))
    if num_items < 1:
        raise ConfigError(describe("num_items", owner, "at least 1", num_items))


def _needle_measurements(
    scores: Sequence[ProbeScore], seed: int, conditions: dict[str, Condition], command: str
) -> list[Measurement]:
    num_exact = sum(score.is_exact for score in scores)
    worst = np.array([float(max(score.ranks)) for score in scores])
    return [
        Measurement(
            name="needle_accuracy",
            value=num_exact / len(scores),
            unit="1",
            spread=wilson(num_exact, len(scores)),
            conditions={**conditions, "interval": "Wilson over items"},
            command=command,
        ),
        answer_log_likelihood("needle_log_likelihood", scores, seed, conditions, command),
        Measurement(
            name="needle_rank",
            value=float(worst.mean()),
            unit="1",
            spread=bootstrap_ratio(worst, np.ones(len(scores)), seed=seed),
            conditions={**conditions, "interval": BOOTSTRAP},
            command=command,
        ),
    ]


def _copy_measurements(
    scores: Sequence[ProbeScore], seed: int, conditions: dict[str, Condition], command: str
) -> list[Measurement]:
    losses = np.array([-sum(score.log_likelihoods) for score in scores])
    sizes = np.array([float(len(score.ranks)) for score in scores])
    return [
        Measurement(
            name="copy_perplexity",
            value=float(np.exp(losses.sum() / sizes.sum())),
            unit="1",
            spread=bootstrap_ratio(losses, sizes, seed=seed, transform=np.exp),
            conditions={**conditions, "interval": BOOTSTRAP},
            command=command,
        ),
        token_accuracy("copy_accuracy", scores, conditions, command),
    ]
