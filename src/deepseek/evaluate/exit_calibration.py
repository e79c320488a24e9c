"""The threshold of early exits, chosen so that a bound on their disagreement holds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.evaluate.base import Condition, Progress, model_conditions, tokenizer_of
from deepseek.evaluate.corpus import Corpus, as_corpus
from deepseek.evaluate.early_exit import score_exits
from deepseek.models import Decoder, Exits
from deepseek.models.exits import Criterion
from deepseek.records import Measurement

THRESHOLDS: dict[Criterion, tuple[float, ...]] = {
    "margin": (0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    "cosine": (0.999, 0.998, 0.996, 0.994, 0.992, 0.99, 0.98, 0.97, 0.96, 0.94, 0.92, 0.9, 0.8),
}
"""Thresholds that are tried in turn, from safe to bold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitCalibration:
    """Exits, and what they promise: on texts like those it was found on, an expected share of at
    most `delta` of the tokens differs from the whole model's, unless the draw of the texts was one
    of the unlucky ones that `confidence` leaves."""

    exits: Exits | None
    """None where not even the safest threshold keeps the bound: the model cannot leave early."""
    delta: float
    confidence: float
    measurements: tuple[Measurement, ...]
    """`disagreement`, `mean_layers`, `perplexity` and `p_value` of every threshold that was
    tried; the condition `threshold` says which."""

    def at(self, threshold: float) -> dict[str, Measurement]:
        """Return the measurements of a threshold by their names."""
        return {
            each.name: each
            for each in self.measurements
            if each.conditions["threshold"] == threshold
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {
            "exits": None if self.exits is None else self.exits.to_dict(),
            "delta": self.delta,
            "confidence": self.confidence,
            "measurements": [each.to_dict() for each in self.measurements],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` wrote.

        Raises:
            FormatError: a field is missing or unknown.
            ConfigError: the exits in it are none.
        """
        given = dict(values)
        try:
            exits = given.pop("exits")
            measurements = tuple(map(Measurement.from_dict, given.pop("measurements")))
            return cls(
                exits=None if exits is None else Exits.from_dict(exits),
                measurements=measurements,
                **given,
            )
        except (TypeError, KeyError) as error:
            must = "the fields of an ExitCalibration"
            raise FormatError(describe("calibration", "a file", must, dict(values))) from error

    def save(self, path: str | Path) -> None:
        """Write the record as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Return the record in a file that `save` wrote.

        Raises:
            ConfigError: there is no such file.
            FormatError: it is no calibration.
        """
        owner = "early exit"
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            step = "Write one by calibrate_exits(…).save(FILE)"
            got = f"{path} ({error.strerror})"
            raise ConfigError(describe("calibration", owner, "a file", got, step)) from error
        except ValueError as error:
            raise FormatError(describe("calibration", owner, "JSON", str(path))) from error
        if not isinstance(values, dict):
            raise FormatError(describe("calibration", owner, "an object", values))
        return cls.from_dict(values)


def calibrate_exits(
    model: Decoder,
    exits: Exits,
    text: Corpus | Sequence[str] | None = None,
    *,
    delta: float = 0.1,
    confidence: float = 0.95,
    thresholds: Sequence[float] | None = None,
    num_prompt_tokens: int = 32,
    num_tokens: int = 96,
    max_texts: int | None = None,
    progress: Progress | None = None,
) -> ExitCalibration:
    """Choose the smallest threshold that keeps a bound on the disagreement with the whole model.

    Thresholds are tested in turn, from safe to bold, and the first that fails ends it, so that
    testing several costs no confidence. A test's null hypothesis is that the expected share of
    tokens of a text that differ is above `delta`. Tokens of one text depend on each other: the text
    is the unit. What is promised is about texts drawn like these, and goes on along the text that
    is there; where the model goes on with its own tokens, the texts may part.

    Args:
        model: the decoder, with a tokenizer.
        exits: places and criterion; the threshold in it is not looked at.
        text: texts, or a corpus whose documents they are; None = the default corpus. The first
            tokens of each are taken; a text that has too few is left out.
        delta: largest expected share of tokens that differ.
        confidence: that the bound holds.
        thresholds: descending; None = `THRESHOLDS` of the criterion. They must not be chosen by
            looking at the texts.
        num_prompt_tokens: of each text, read by all layers.
        num_tokens: of each text behind these, which may leave early.
        max_texts: only the first texts; None = all.
        progress: called after each text.

    Raises:
        ConfigError: numbers out of range, exits that the model cannot have, or so few texts that
            the bound could not be shown even if no token differed.

    Source: Schuster et al. 2022, "Confident Adaptive Language Modeling" (2207.07061), section 3:
    fixed-sequence testing as Angelopoulos et al. 2021, "Learn then Test" (2110.01052). Deviations:
    the loss is the disagreement of tokens, not of whole outputs; the p-value is one by betting, as
    that of Hoeffding and Bentkus takes no notice of how little texts differ.
    """
    thresholds = THRESHOLDS[exits.criterion] if thresholds is None else tuple(thresholds)
    _check(delta, confidence, thresholds)
    if text is None or isinstance(text, Corpus):
        corpus = as_corpus(text)
        documents: Sequence[str] = corpus.documents()
    else:
        corpus, documents = as_corpus("\n\n".join(text)), text
    length = num_prompt_tokens + num_tokens
    whole = first_tokens(model, documents, length)[:max_texts]
    alpha = 1 - confidence
    if (least := fewest_texts(delta, alpha)) > len(whole):
        must = f"at least {least} texts of {length} tokens to show a bound of {delta}"
        step = "Give more texts, shorter ones, or allow more"
        raise ConfigError(describe("text", "calibrate_exits", must, len(whole), step))
    tried = score_exits(
        model,
        whole,
        [exits.replace(threshold=threshold) for threshold in thresholds],
        num_prompt_tokens=num_prompt_tokens,
        progress=progress,
    )
    conditions: dict[str, Condition] = {**model_conditions(model), **corpus.conditions()}
    conditions |= {"prompt_tokens": num_prompt_tokens, "delta": delta, "confidence": confidence}
    found: list[Measurement] = []
    p_values: list[float] = []
    for scores in tried:
        shown = scores.measurements(conditions)
        p_values.append(p_value(scores.disagreements.tolist(), delta, alpha))
        facts = shown[0].conditions
        found += [
            *shown,
            Measurement(name="p_value", value=p_values[-1], unit="1", conditions=facts),
        ]
    chosen = boldest(p_values, alpha)
    return ExitCalibration(
        exits=None if chosen is None else tried[chosen].exits,
        delta=delta,
        confidence=confidence,
        measurements=tuple(found),
    )


def first_tokens(model: Decoder, documents: Sequence[str], length: int) -> list[list[int]]:
    """Return the first tokens of each document that has so many.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    tokenizer = tokenizer_of(model, None, "early exit")
    encoded = [tokenizer.encode(document)[:length] for document in documents]
    return [ids for ids in encoded if len(ids) == length]


def boldest(p_values: Sequence[float], alpha: float) -> int | None:
    """Return the last place before the first p-value above `alpha`; None where that is the first.

    Source: fixed-sequence testing, Angelopoulos et al. 2021 (2110.01052), section 2.
    """
    passed = next((n for n, value in enumerate(p_values) if value > alpha), len(p_values))
    return passed - 1 if passed else None


def p_value(losses: Sequence[float], delta: float, alpha: float) -> float:
    """Return a p-value of the hypothesis that losses from 0 to 1 have a mean above `delta`.

    It is won by bets against the hypothesis: each stakes a share of the capital, chosen from the
    losses before it, on the next loss being below `delta`. Where the hypothesis is true the capital
    is 1 on average, so it is ever as large as c with a chance of at most 1 / c.

    Args:
        losses: independent, at least one; their order counts.
        delta: between 0 and 1.
        alpha: level of the test that stakes are made for; the p-value holds at every level.

    Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting"
    (2010.09686), section 4; as a bound on a risk Bates et al. (2101.02703), proposition 5.
    """
    bold = -2 * math.log(alpha) / len(losses)
    total, squares, capital, best = 0.5, 0.25, 0.0, 0.0
    for number, loss in enumerate(losses, start=1):
        stake = min(1 / (1 - delta), math.sqrt(bold * number / squares))
        gain = 1 - stake * (loss - delta)
        capital += math.log(gain) if gain > 0 else -math.inf
        best = max(best, capital)
        total += loss
        squares += (loss - total / (number + 1)) ** 2
    return math.exp(-best)


def fewest_texts(delta: float, alpha: float) -> int:
    """Return how many texts it takes to show a bound where no token of them differs."""
    count = math.ceil(math.log(alpha) / math.log1p(-delta))
    while p_value([0.0] * count, delta, alpha) > alpha:
        count += 1
    return count


def _check(delta: float, confidence: float, thresholds: Sequence[float]) -> None:
    for name, value in (("delta", delta), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(describe(name, "calibrate_exits", "between 0 and 1", value))
    if not thresholds or list(thresholds) != sorted(set(thresholds), reverse=True):
        must = "different ones, from safe to bold (descending)"
        raise ConfigError(describe("thresholds", "calibrate_exits", must, thresholds))
