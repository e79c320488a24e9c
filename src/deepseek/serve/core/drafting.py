"""Guesses of the next tokens: from the text itself, and how many of them are worth checking."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

from deepseek.errors import ConfigError, describe
from deepseek.serve.core.cost import Average, CostModel
from deepseek.serve.core.request import Request


class Drafter(Protocol):
    """Guesses how a text goes on."""

    @property
    def guess_s(self) -> float:
        """Seconds that one guess costs before it is checked."""
        ...

    def draft(self, request: Request, most: int) -> Sequence[int]:
        """Return at most `most` guesses of the tokens behind `request.tokens`, or none."""
        ...

    def close(self, request: Request) -> None:
        """Forget a request that is finished."""
        ...


MOST_PLACES = 4
"""Earlier places of an n-gram that are remembered, the most recent ones."""


class PromptLookup:
    """Guesses that a text goes on as it did the last time it came by the same words.

    The longest of the ends of the text that occurred before decides, of equally long ones the most
    recent. A text that repeats itself is continued beyond its own end. Each token costs the same
    constant work once, however long the text.

    Source: prompt lookup decoding (Saxena 2023); like LLMA (Yang et al. 2023, 2304.04487), answers
    are looked up as well.
    """

    def __init__(self, max_ngram: int = 8, min_ngram: int = 2) -> None:
        """Look for ends of at least `min_ngram` tokens, and compare at most `max_ngram`.

        Raises:
            ConfigError: the numbers are not 1 <= min_ngram <= max_ngram.
        """
        if not 1 <= min_ngram <= max_ngram:
            must = f"between 1 and max_ngram ({max_ngram})"
            raise ConfigError(describe("min_ngram", "PromptLookup", must, min_ngram))
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self._texts: dict[str, _Index] = {}

    guess_s = 0.0
    """A look-up costs nothing beside a step."""

    def __len__(self) -> int:
        return len(self._texts)

    def draft(self, request: Request, most: int) -> list[int]:
        """Return at most `most` guesses of the tokens behind `request.tokens`, or none."""
        index = self._texts.setdefault(request.id, _Index())
        index.catch_up(request.tokens, self.min_ngram)
        place = self._best_place(request.tokens, index)
        if place is None:
            return []
        guesses: list[int] = []
        for source in range(place, place + most):
            behind = source - len(request.tokens)
            guesses.append(request.tokens[source] if behind < 0 else guesses[behind])
        return guesses

    def close(self, request: Request) -> None:
        """Forget a request that is finished."""
        self._texts.pop(request.id, None)

    def _best_place(self, tokens: Sequence[int], index: _Index) -> int | None:
        """Return the place behind the best earlier occurrence of the text's end."""
        best, longest = None, 0
        for place in reversed(index.places.get(tuple(tokens[-self.min_ngram :]), ())):
            length = self.min_ngram
            most = min(self.max_ngram, place)
            while length < most and tokens[place - 1 - length] == tokens[-1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
        return best


class _Index:
    """Where each n-gram of a text was followed by something."""

    __slots__ = ("num_read", "places")

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], list[int]] = {}
        self.num_read = 0

    def catch_up(self, tokens: Sequence[int], size: int) -> None:
        for place in range(max(self.num_read, size), len(tokens)):
            places = self.places.setdefault(tuple(tokens[place - size : place]), [])
            places.append(place)
            if len(places) > MOST_PLACES:
                del places[0]
        self.num_read = len(tokens)


MARGIN = 1.25
"""By how much a guess must be worth more than it costs, for the cost model is only a model."""

PROBE_LIMIT = 0.8
"""Where a guess must be more certain than this to pay, it is not even tried."""

FIRST_ACCEPTANCE = 0.6
FIRST_PRICE = 0.4
MIN_PROBE_STEPS, MAX_PROBE_STEPS = 8, 256


@dataclasses.dataclass(slots=True)
class _Record:
    """How the guesses for one request have fared; older rounds count less."""

    accepted: float = 0.0
    checked: float = 0.0
    steps_idle: int = 0
    probe_steps: int = MIN_PROBE_STEPS


class DraftControl:
    """How many guesses are worth checking, for one request in one step.

    The i-th guess is of use if it and all before it are right: with probability p**i, where p is
    the measured share of guesses that were. It is worth its cost while the tokens per second of the
    step grow by it: p**i / (token_s + guess_s) > num_tokens / step_s. So a step that is
    memory-bound, with one row, takes many, and a full one takes none. Where p is too low, a single
    guess is tried from time to time, ever more seldom while these fail.
    """

    def __init__(self, cost: CostModel, max_drafts: int) -> None:
        """Ask `cost` for the price, and never allow more than `max_drafts`."""
        self._cost = cost
        self._max_drafts = max_drafts
        self._records: dict[str, _Record] = {}
        self._usual = Average(0.05)

    def __len__(self) -> int:
        return len(self._records)

    def most(self, request: Request, num_tokens: int, guess_s: float = 0.0) -> int:
        """Return how many guesses a request may have in a step of so many tokens otherwise.

        Args:
            request: that would have them.
            num_tokens: of the step without them.
            guess_s: seconds that making one costs.
        """
        if self._max_drafts < 1:
            return 0
        record = self._records.setdefault(request.id, _Record())
        price = self.price(num_tokens, guess_s)
        acceptance = self.acceptance(request)
        if acceptance > price:
            return min(self._max_drafts, _longest(acceptance, price))
        record.steps_idle += 1
        is_probe = price < PROBE_LIMIT and record.steps_idle >= record.probe_steps
        return 1 if is_probe else 0

    def price(self, num_tokens: int, guess_s: float = 0.0) -> float:
        """Return the least probability of being right at which one more guess pays in a step of so
        many tokens. While the costs are unknown, only a request that is alone may try."""
        if not self._cost.is_ready:
            return FIRST_PRICE if num_tokens == 1 else 1.0
        guess_s += self._cost.token_s
        return MARGIN * guess_s * num_tokens / self._cost.seconds(num_tokens)

    def acceptance(self, request: Request) -> float:
        """Return the probability that a guess for a request is right, if those before it are."""
        usual = FIRST_ACCEPTANCE if self._usual.value is None else self._usual.value
        record = self._records.get(request.id)
        if record is None:
            return usual
        return (record.accepted + 2 * usual) / (record.checked + 2)

    def observe(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """Learn how the guesses of a step fared; there was at least one."""
        record = self._records.setdefault(request.id, _Record())
        # guesses behind the first wrong one say nothing
        num_checked = min(num_accepted + 1, num_drafts)
        record.accepted = 0.8 * record.accepted + num_accepted
        record.checked = 0.8 * record.checked + num_checked
        record.steps_idle = 0
        if num_accepted:
            record.probe_steps = MIN_PROBE_STEPS
        else:
            record.probe_steps = min(2 * record.probe_steps, MAX_PROBE_STEPS)
        self._usual.observe(num_accepted / num_checked)

    def close(self, request: Request) -> None:
        """Forget a request that is finished."""
        self._records.pop(request.id, None)


def _longest(acceptance: float, price: float) -> int:
    """Return the largest i with acceptance**i > price, where there is one."""
    if acceptance >= 1 or price <= 0:
        return 1 << 16
    return max(math.ceil(math.log(price) / math.log(acceptance)) - 1, 1)
