"""What is asked of a server: dialogues of one or more turns, the same for the same seed.

Lengths are in tokens of about one word each (`words`); how many a server counted is measured.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Literal, get_args

from deepseek.errors import ConfigError, describe
from deepseek.serve.load.lengths import VARIES, Lengths, Vary
from deepseek.serve.load.words import WORDS

Kind = Literal["random", "shared-prefix", "dialogue", "copy", "text"]
"""`random`: words in no order, no two prompts alike. `shared-prefix`: the same long system prompt
before all of them. `dialogue`: turns that carry the answers before them. `copy`: a passage twice,
so that the answer repeats it. `text`: passages of a given text."""

KINDS: tuple[str, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What a user says, and how the answer is taken."""

    text: str
    max_tokens: int
    hang_up_after: int | None = None
    """Pieces of the answer after which the user is gone; None who stays to the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogue:
    """What one user asks, turn after turn. A single request is a dialogue of one turn."""

    number: int
    turns: tuple[Turn, ...]
    system: str = ""
    """A system prompt, empty for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A description of dialogues.

    Raises:
        ConfigError: a number out of range, an unknown kind, or a text where none belongs.
    """

    kind: Kind = "random"
    num_dialogues: int = 64
    prompt_tokens: int = 128
    """Mean tokens of what a user says, in the first turn of a dialogue."""
    new_tokens: int = 64
    """Mean tokens of an answer."""
    vary: Vary = "fixed"
    prefix_tokens: int = 512
    """Tokens of the system prompt of `shared-prefix`."""
    turns: int = 2
    """Turns of a `dialogue`."""
    follow_tokens: int = 32
    """Mean tokens of what a user says in the later turns of a `dialogue`."""
    hang_up_share: float = 0.0
    """Share of the dialogues whose user is gone before the last answer ends."""
    seed: int = 0
    text: str = dataclasses.field(default="", repr=False)
    """What `text` takes its passages from."""

    def __post_init__(self) -> None:
        """Check what can be checked without making anything."""
        for name, values in (("kind", KINDS), ("vary", VARIES)):
            if getattr(self, name) not in values:
                must = f"one of {', '.join(values)}"
                raise ConfigError(describe(name, "Workload", must, getattr(self, name)))
        counts = ("num_dialogues", "prompt_tokens", "new_tokens", "prefix_tokens", "turns")
        for name in (*counts, "follow_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "Workload", "at least 1", getattr(self, name)))
        if not 0 <= self.hang_up_share <= 1:
            must = "a share from 0 to 1"
            raise ConfigError(describe("hang_up_share", "Workload", must, self.hang_up_share))
        if (self.kind == "text") != bool(self.text.split()):
            must = "words for the kind text, and for no other"
            raise ConfigError(describe("text", "Workload", must, self.text[:60]))

    @property
    def longest_tokens(self) -> int:
        """Most tokens that a prompt and its answer have together, by our count."""
        prompt = Lengths(self.prompt_tokens, self.vary).longest
        answer = Lengths(self.new_tokens, self.vary).longest
        prefix = self.prefix_tokens if self.kind == "shared-prefix" else 0
        later = self.turns - 1 if self.kind == "dialogue" else 0
        follow = Lengths(self.follow_tokens, self.vary).longest
        return prefix + prompt + answer + later * (follow + answer)


def plan_dialogues(workload: Workload, part: int = 0) -> Iterator[Dialogue]:
    """Yield the dialogues of a workload.

    Args:
        workload: what they are like.
        part: which of many measurements they are for. Parts differ in every prompt and in the
            shared prefix, so that what a server remembers of one helps it in no other.
    """
    prefix = ""
    if workload.kind == "shared-prefix":
        prefix = _words(_generator(workload, part, "prefix"), workload.prefix_tokens)
    said = [Lengths(workload.prompt_tokens, workload.vary)]
    if workload.kind == "dialogue":
        said += [Lengths(workload.follow_tokens, workload.vary)] * (workload.turns - 1)
    answers = Lengths(workload.new_tokens, workload.vary)
    given = workload.text.split()
    for number in range(workload.num_dialogues):
        generator = _generator(workload, part, number)
        turns = [
            Turn(
                text=_prompt(workload.kind, lengths.draw(generator), generator, given),
                max_tokens=answers.draw(generator),
            )
            for lengths in said
        ]
        if generator.random() < workload.hang_up_share:
            pieces = generator.randint(0, turns[-1].max_tokens // 2)
            turns[-1] = dataclasses.replace(turns[-1], hang_up_after=pieces)
        yield Dialogue(number=number, turns=tuple(turns), system=prefix)


def _generator(workload: Workload, part: int, name: str | int) -> random.Random:
    # a string seeds alike on every machine
    return random.Random(f"{workload.seed}/{part}/{workload.kind}/{name}")


def _words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(WORDS, k=count))


def _prompt(kind: Kind, count: int, generator: random.Random, given: list[str]) -> str:
    """Return a prompt of about `count` tokens."""
    if kind == "copy":
        passage = _words(generator, max(1, count // 2))
        return f"{passage}\n{passage}\n"
    if kind == "text":
        start = generator.randrange(len(given))
        return " ".join(given[(start + place) % len(given)] for place in range(count))
    return _words(generator, count)
