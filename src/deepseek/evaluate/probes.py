"""Sequences whose last tokens can be known only from earlier ones, and what a model says of them.

One forward pass with the right answer in place (teacher forcing) judges a model: that needs no
skill in following instructions and no decoding loop, so it works on small models and at any length.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

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
    position_logits,
    target_scores,
)
from deepseek.evaluate.corpus import Corpus
from deepseek.evaluate.intervals import NUM_RESAMPLES, bootstrap_ratio, clustered_wilson
from deepseek.records import Measurement

BOOTSTRAP = f"bootstrap over items, {NUM_RESAMPLES} resamples"
"""How the interval of a mean over items is made."""


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
    """What `needle`, `copy_accuracy` or `variable_tracking` found."""

    measurements: list[Measurement]
    items: tuple[ProbeScore, ...]


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


class Haystack:
    """The tokens of a text, from which pieces of exact length are cut."""

    def __init__(self, tokenizer: TextTokenizer, corpus: Corpus) -> None:
        """Read the text of a corpus."""
        self.name = corpus.name
        self.ids = tokenizer.encode(corpus.text, add_special_tokens=False)
        ends: dict[int, bool] = {}
        for token in set(self.ids):
            text = tokenizer.decode([token]).rstrip(" ")
            ends[token] = text.endswith((".", "\n", "!", "?"))
        self.ends_sentence = ends

    def piece(self, num_tokens: int, chance: random.Random) -> list[int]:
        """Return that many tokens in a row from a place left to chance.

        Raises:
            ConfigError: the text is shorter.
        """
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

    def hide(self, piece: Sequence[int], hidden: Sequence[tuple[float, list[int]]]) -> list[int]:
        """Return a piece with tokens put in, each after the end of a sentence nearest to its depth;
        of those at one place, the first given stands first."""
        placed = [(self.sentence_end(piece, depth), tokens) for depth, tokens in hidden]
        whole: list[int] = []
        done = 0
        for place, tokens in sorted(placed, key=lambda pair: pair[0]):
            whole += [*piece[done:place], *tokens]
            done = place
        return [*whole, *piece[done:]]


def token_accuracy(
    name: str, scores: Sequence[ProbeScore], conditions: Mapping[str, Condition], command: str
) -> Measurement:
    """Return the share of answer tokens that greedy decoding would write, Wilson over items as
    clusters."""
    right = np.array([float(sum(rank == 0 for rank in score.ranks)) for score in scores])
    sizes = np.array([float(len(score.ranks)) for score in scores])
    return Measurement(
        name=name,
        value=float(right.sum() / sizes.sum()),
        unit="1",
        spread=clustered_wilson(right, sizes),
        conditions={**conditions, "interval": "Wilson over items as clusters"},
        command=command,
    )


def answer_log_likelihood(
    name: str,
    scores: Sequence[ProbeScore],
    seed: int,
    conditions: Mapping[str, Condition],
    command: str,
) -> Measurement:
    """Return the mean log-likelihood of an answer's token, bootstrap over items."""
    sums = np.array([sum(score.log_likelihoods) for score in scores])
    sizes = np.array([float(len(score.log_likelihoods)) for score in scores])
    return Measurement(
        name=name,
        value=float(sums.sum() / sizes.sum()),
        unit="nats/token",
        spread=bootstrap_ratio(sums, sizes, seed=seed),
        conditions={**conditions, "interval": BOOTSTRAP},
        command=command,
    )
