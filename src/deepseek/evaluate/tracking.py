"""Variable tracking: chains of assignments hidden in a long text, followed to all their names.

It is judged by teacher forcing, see `probes.py`.
"""

from __future__ import annotations

import itertools
import random
import string

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
from deepseek.evaluate.intervals import clustered_wilson
from deepseek.evaluate.probes import (
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
    "Memorize and track the {chains} of variable assignment hidden in the following text.\n"
)
_START = "\nVAR {name} = {value}\n"
_HOP = "\nVAR {name} = VAR {before}\n"
_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the {chains} of variable assignment in the text above, {count} variables "
    "are assigned the value {value}, they are:"
)
_NAME_LETTERS = 5
_MAX_NAMES = 1000


def variable_tracking(
    model: CausalModel,
    *,
    length: int,
    num_chains: int = 1,
    num_hops: int = 4,
    num_items: int = 20,
    text: str | Corpus | None = None,
    tokenizer: TextTokenizer | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RetrievalResult:
    """Measure whether a model follows assignments from name to name through a long text.

    A variable is assigned a number, the next one that variable, and so on; the question asks for
    all that hold the number. An example with other names, without filler, shows the form.

    Args:
        model: see `base.CausalModel`.
        length: tokens of the whole sequence, example, question and answer included; exact.
        num_chains: chains hidden; one is asked for, the others mislead.
        num_hops: assignments of a chain behind its first; one more variable is to be named.
        num_items: sequences, each with its own names and its own piece of the text.
        text: the filler; None = the default corpus. At least `length` tokens.
        tokenizer: None = the model's own.
        seed: of names, numbers, places and the bootstrap.
        progress: called after each item.

    Returns:
        `tracking_accuracy` (share of the names' tokens that greedy decoding would write; Wilson
        over items as clusters), `tracking_names` (share of names all of whose tokens are such; the
        same) and `tracking_log_likelihood` (of the answer, a token; bootstrap over items).

    Raises:
        ConfigError: the text is shorter than `length`, or `length` has no room for the assignments.

    Source: RULER (arXiv 2404.06654), section 3 and appendix B, task variable_tracking; the
    generator is our own. Deviations: the filler is the given text, and an assignment stands on a
    line of its own after the end of a sentence; pieces are joined as tokens, so that lengths are
    exact; the example has names as long as the task's; scored by teacher forcing, the names in the
    chain's order.
    """
    tokenizer = tokenizer_of(model, tokenizer, "variable_tracking")
    corpus = as_corpus(text)
    _check(num_chains, num_hops, num_items)
    haystack = Haystack(tokenizer, corpus)
    chance = random.Random(seed)
    made = [
        _tracking_probe(tokenizer, haystack, length, num_chains, num_hops, chance)
        for _ in range(num_items)
    ]
    scores = score_probes(model, [probe for probe, _ in made], "tracking", progress)
    conditions: dict[str, Condition] = {**model_conditions(model), **corpus.conditions()}
    conditions |= {"length": length, "chains": num_chains, "hops": num_hops, "items": num_items}
    conditions["seed"] = seed
    flags = {"lengths": length, "num_chains": num_chains, "num_hops": num_hops}
    flags |= {"num_items": num_items, "text": corpus.flag(), "seed": seed}
    command = repeat_command(model, "tracking", flags, repeatable=corpus.is_repeatable)
    sizes = [sizes for _, sizes in made]
    found = [
        token_accuracy("tracking_accuracy", scores, conditions, command),
        _names_right(scores, sizes, conditions, command),
        answer_log_likelihood("tracking_log_likelihood", scores, seed, conditions, command),
    ]
    return RetrievalResult(found, tuple(scores))


def _tracking_probe(
    tokenizer: TextTokenizer,
    haystack: Haystack,
    length: int,
    num_chains: int,
    num_hops: int,
    chance: random.Random,
) -> tuple[Probe, list[int]]:
    """Return a probe, and how many tokens each name of its answer has."""
    size = num_hops + 1
    names = _names((num_chains + 1) * size, chance)
    chains = [names[begin : begin + size] for begin in range(0, len(names), size)]
    values = [str(number) for number in chance.sample(range(10**4, 10**5), num_chains + 1)]
    words = {"chains": "chain" if num_chains == 1 else "chains", "count": size}
    intro = _INTRODUCTION.format(**words)
    example = "".join(_assignments(chains[-1], values[-1]))
    example += _QUESTION.format(value=values[-1], **words) + " " + " ".join(chains[-1]) + "\n\n"

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False)

    begin = tokenizer.encode(intro + example + intro)
    question = encode(_QUESTION.format(value=values[0], **words))
    answer = [encode(f" {name}") for name in chains[0]]
    hidden: list[tuple[float, list[int]]] = []
    for chain, value in zip(chains[:-1], values[:-1], strict=True):
        depths = sorted(chance.random() for _ in chain)
        lines = [encode(line) for line in _assignments(chain, value)]
        hidden += zip(depths, lines, strict=True)
    num_answer = sum(map(len, answer))
    room = length - len(begin) - len(question) - num_answer - sum(len(line) for _, line in hidden)
    if room < 0:
        must = f"at least {length - room} tokens, to hold example, assignments and answer"
        raise ConfigError(describe("length", "variable_tracking", must, length))
    body = haystack.hide(haystack.piece(room, chance), hidden)
    ids = (*begin, *body, *question, *(token for name in answer for token in name))
    return Probe(ids=ids, num_scored=num_answer), [len(name) for name in answer]


def _names(count: int, chance: random.Random) -> list[str]:
    """Return different names of capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.choices(string.ascii_uppercase, k=_NAME_LETTERS))] = None
    return list(names)


def _assignments(chain: list[str], value: str) -> list[str]:
    hops = itertools.pairwise(chain)
    return [
        _START.format(name=chain[0], value=value),
        *(_HOP.format(name=name, before=before) for before, name in hops),
    ]


def _names_right(
    scores: list[ProbeScore],
    sizes: list[list[int]],
    conditions: dict[str, Condition],
    command: str,
) -> Measurement:
    right = []
    for score, each in zip(scores, sizes, strict=True):
        ranks = iter(score.ranks)
        right.append(float(sum(max(itertools.islice(ranks, size)) == 0 for size in each)))
    asked = np.array([float(len(each)) for each in sizes])
    return Measurement(
        name="tracking_names",
        value=sum(right) / float(asked.sum()),
        unit="1",
        spread=clustered_wilson(np.array(right), asked),
        conditions={**conditions, "interval": "Wilson over items as clusters"},
        command=command,
    )


def _check(num_chains: int, num_hops: int, num_items: int) -> None:
    owner = "variable_tracking"
    if num_chains < 1 or num_hops < 1 or (num_chains + 1) * (num_hops + 1) > _MAX_NAMES:
        must = f"at least 1, with at most {_MAX_NAMES} names in all"
        got = f"{num_chains} and {num_hops}"
        raise ConfigError(describe("num_chains and num_hops", owner, must, got))
    if num_items < 1:
        raise ConfigError(describe("num_items", owner, "at least 1", num_items))
