"""Retrieval from a long context: a needle in a haystack, and copying an earlier passage.

Both judge a model by one forward pass with the right answer in place (teacher forcing), which
needs no skill in following instructions and no decoding loop, so they work on small models and
at any length.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import torch

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import (
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    device_of,
    measuring,
    model_conditions,
    position_logits,
    repeat_command,
    target_scores,
    tokenizer_of,
)
from deepseek.evaluate.corpus import Corpus, as_corpus
from deepseek.evaluate.intervals import NUM_RESAMPLES, bootstrap_ratio, clustered_wilson, wilson
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A sequence whose last tokens can be known only from earlier ones."""

    ids: tuple[int, ...]
    """All of it, the answer included."""
    num_scored: int
    """How many tokens at the end are the answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """What a model said of the answer of one probe."""

    log_likelihoods: tuple[float, ...]
    """Of each answer token given all before it, in nats."""
    ranks: tuple[int, ...]
    """How many tokens were likelier than each answer token; 0 = greedy decoding writes it."""

    @property
    def is_exact(self) -> bool:
        """Whether greedy decoding would write the whole answer."""
        return all(rank == 0 for rank in self.ranks)


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
    """What `needle` or `copy_accuracy` found."""

    measurements: list[Measurement]
    items: tuple[ProbeScore, ...]


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
    haystack = _Haystack(tokenizer, corpus)
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
    haystack = _Haystack(tokenizer, corpus)
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


def score_probes(
    model: CausalModel, probes: Sequence[Probe], what: str, progress: Progress | None = None
) -> list[ProbeScore]:
    """Return what a model says of the answer of each probe, one forward pass each.

    Args:
        model: see `base.CausalModel`.
        probes: what to score.
        what: the name for the progress.
        progress: called after each probe.
    """
    scores = []
    with measuring(model):
        for number, probe in enumerate(probes, start=1):
            ids = torch.tensor([probe.ids], device=device_of(model))
            logits = position_logits(model, ids, len(probe.ids) - probe.num_scored - 1)
            found, ranks = target_scores(logits[0, :-1], ids[0, -probe.num_scored :])
            scores.append(
                ProbeScore(log_likelihoods=tuple(found.tolist()), ranks=tuple(ranks.tolist()))
            )
            if progress is not None:
                progress(what, number / len(probes))
    return scores


class _Haystack:
    """The tokens of a text, from which pieces of exact length are cut."""

    def __init__(self, tokenizer: TextTokenizer, corpus: Corpus) -> None:
        self.name = corpus.name
        self.ids = tokenizer.encode(corpus.text, add_special_tokens=False)
        ends: dict[int, bool] = {}
        for token in set(self.ids):
            text = tokenizer.decode([token]).rstrip(" ")
            ends[token] = text.endswith((".", "\n", "!", "?"))
        self.ends_sentence = ends

    def piece(self, num_tokens: int, chance: random.Random) -> list[int]:
        """Return that many tokens in a row from a place left to chance."""
        spare = len(self.ids) - num_tokens
        if spare < 0:
            must = f"at least {num_tokens} tokens long"
            got = f"{self.name} with {len(self.ids)} tokens"
            step = "Give a longer text, or ask for a shorter length"
            raise ConfigError(describe("text", "the retrieval tests", must, got, step))
        begin = chance.randint(0, spare)
        return list(self.ids[begin : begin + num_tokens])

    def sentence_end(self, piece: Sequence[int], depth: float) -> int:
        """Return the place after the end of a sentence that is nearest to a depth of 0 to 1."""
        wanted = round(depth * len(piece))
        for away in range(len(piece) + 1):
            for place in (wanted - away, wanted + away):
                if place in (0, len(piece)) or (
                    0 < place < len(piece) and self.ends_sentence[piece[place - 1]]
                ):
                    return place
        return wanted


def _needle_probe(
    tokenizer: TextTokenizer,
    haystack: _Haystack,
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
    places = [haystack.sentence_end(piece, each) for each in depths]
    body: list[int] = []
    done = 0
    for place, hidden in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
        body += piece[done:place] + hidden
        done = place
    ids = (*intro, *body, *piece[done:], *question, *answer)
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
    sums = np.array([sum(score.log_likelihoods) for score in scores])
    sizes = np.array([float(len(score.log_likelihoods)) for score in scores])
    worst = np.array([float(max(score.ranks)) for score in scores])
    bootstrap = f"bootstrap over items, {NUM_RESAMPLES} resamples"
    return [
        Measurement(
            name="needle_accuracy",
            value=num_exact / len(scores),
            unit="1",
            spread=wilson(num_exact, len(scores)),
            conditions={**conditions, "interval": "Wilson over items"},
            command=command,
        ),
        Measurement(
            name="needle_log_likelihood",
            value=float(sums.sum() / sizes.sum()),
            unit="nats/token",
            spread=bootstrap_ratio(sums, sizes, seed=seed),
            conditions={**conditions, "interval": bootstrap},
            command=command,
        ),
        Measurement(
            name="needle_rank",
            value=float(worst.mean()),
            unit="1",
            spread=bootstrap_ratio(worst, np.ones(len(scores)), seed=seed),
            conditions={**conditions, "interval": bootstrap},
            command=command,
        ),
    ]


def _copy_measurements(
    scores: Sequence[ProbeScore], seed: int, conditions: dict[str, Condition], command: str
) -> list[Measurement]:
    losses = np.array([-sum(score.log_likelihoods) for score in scores])
    sizes = np.array([float(len(score.ranks)) for score in scores])
    copied = np.array([float(sum(rank == 0 for rank in score.ranks)) for score in scores])
    bootstrap = f"bootstrap over items, {NUM_RESAMPLES} resamples"
    return [
        Measurement(
            name="copy_perplexity",
            value=float(np.exp(losses.sum() / sizes.sum())),
            unit="1",
            spread=bootstrap_ratio(losses, sizes, seed=seed, transform=np.exp),
            conditions={**conditions, "interval": bootstrap},
            command=command,
        ),
        Measurement(
            name="copy_accuracy",
            value=float(copied.sum() / sizes.sum()),
            unit="1",
            spread=clustered_wilson(copied, sizes),
            conditions={**conditions, "interval": "Wilson over items as clusters"},
            command=command,
        ),
    ]
