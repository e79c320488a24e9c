"""What a compressed model must pass: each gate is data, and its verdict goes on the bundle's card.

A gate holds only where the whole 95 % interval is on the right side of its limit: one that cannot
tell with the items it has does not hold, and says how many it would need.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from deepseek.compress.calibration import PYTHON_TOPICS, measured_part, texts_of
from deepseek.compress.work import Report
from deepseek.config import Config
from deepseek.data import read_labelled
from deepseek.errors import ConfigError, describe
from deepseek.evaluate import accuracy, next_sentence_items, read_choice_items, speed_side_by_side
from deepseek.evaluate.base import CausalModel, TextTokenizer, tokenizer_of
from deepseek.evaluate.choice import multiple_choice
from deepseek.evaluate.corpus import Corpus
from deepseek.evaluate.engine_model import EngineModel
from deepseek.evaluate.paired import PairedItems, paired_text
from deepseek.generate.modules import engine_of, why_no_engine
from deepseek.models import Decoder, Encoder
from deepseek.records import Measurement, Verdict


@dataclasses.dataclass(frozen=True)
class Contest:
    """A compressed model beside the one that it came from."""

    model: Decoder | Encoder
    """The bundle as users load it, which runs on its engine where it has one."""
    reference: Decoder | Encoder
    """What it must still be like, in float32."""
    replaced: Decoder | Encoder
    """What is run today in its place, for speeds."""
    num_bytes: int
    """Of the whole bundle on disk."""
    reference_parameters: int
    """Numbers of the reference, tied ones once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGate(Config):
    """How text is predicted, paired window by window with the reference."""

    kind: Literal["text"] = "text"
    most_perplexity_ratio: float | None = 1.005
    most_divergence: float | None = None
    """Mean KL(reference || model) in nats a token."""
    least_agreement: float | None = None
    """Share of tokens behind which both find the same one likeliest."""
    text: str = PYTHON_TOPICS
    """A file or folder, of which the last fifth is read, or `python-topics`."""
    tokens: int = 16384
    """To measure on, if the text has so many."""
    window: int = 512
    """Tokens that are seen together."""

    def __post_init__(self) -> None:
        limits = (self.most_perplexity_ratio, self.most_divergence, self.least_agreement)
        if all(limit is None for limit in limits):
            must = "given, one at least"
            raise ConfigError(describe("limits", "TextGate", must, None))
        if self.window < 2 or self.tokens < 2 * self.window:
            must = "at least two windows of two tokens"
            got = f"{self.tokens} tokens, windows of {self.window}"
            raise ConfigError(describe("tokens and window", "TextGate", must, got))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskGate(Config):
    """How many multiple-choice items are still right, paired item by item with the reference."""

    kind: Literal["task"] = "task"
    most_loss: float | None = 0.012
    """Share of the items that may be lost, net."""
    least_kept: float | None = None
    """Share of the ability above guessing that must be kept."""
    items: str | None = None
    """JSONL file of `deepseek eval --choice-items`; None for which sentence follows, out of the
    documentation inside Python."""
    num_items: int = 400
    """Where no file is given, or the first of its items."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most_loss is None and self.least_kept is None:
            raise ConfigError(describe("limits", "TaskGate", "given, one at least", None))
        if self.num_items < 2:
            raise ConfigError(describe("num_items", "TaskGate", "at least 2", self.num_items))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeGate(Config):
    """What the whole bundle takes on disk, embeddings, scales and tokenizer counted."""

    kind: Literal["size"] = "size"
    most_share: float = 0.25
    """Of the reference's numbers in `against`."""
    against: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedGate(Config):
    """Not slower than what it replaces, by turns in the same run."""

    kind: Literal["speed"] = "speed"
    least_decode: float = 1.0
    """Times the speed of what is replaced; the median of the rounds."""
    least_prefill: float = 1.0
    prompt_tokens: int = 256
    new_tokens: int = 32
    rounds: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelGate(Config):
    """How many texts a classifier still gives their label, paired text by text."""

    kind: Literal["label"] = "label"
    data: str
    """Labelled texts, `.csv`, `.tsv` or `.jsonl`, that nothing was trained on."""
    most_loss: float | None = 0.013
    """Share of the texts that may be lost, net."""
    least_kept: float | None = None
    """Share of the ability above guessing that must be kept."""
    text: str = "text"
    """The column of the texts."""
    label: str = "label"
    """The column of their labels."""

    def __post_init__(self) -> None:
        if self.most_loss is None and self.least_kept is None:
            raise ConfigError(describe("limits", "LabelGate", "given, one at least", None))


GateConfig = TextGate | TaskGate | LabelGate | SizeGate | SpeedGate


def judge(gate: GateConfig, contest: Contest, report: Report) -> Verdict:
    """Return whether a gate holds, with what was measured.

    Raises:
        ConfigError: its text or items are not there, or too few for an interval.
    """
    if isinstance(gate, TextGate):
        return _judge_text(gate, contest, report)
    if isinstance(gate, TaskGate):
        return _judge_task(gate, contest, report)
    if isinstance(gate, SizeGate):
        return _judge_size(gate, contest)
    if isinstance(gate, LabelGate):
        return _judge_labels(gate, contest, report)
    return _judge_speed(gate, contest, report)


def _decoders(gate: Config, contest: Contest) -> tuple[Decoder, Decoder]:
    """Return the model and its reference where the gate can judge them."""
    if not isinstance(contest.model, Decoder) or not isinstance(contest.reference, Decoder):
        must, step = "of a decoder", "An encoder has the gates `label` and `size`"
        raise ConfigError(describe("model", type(gate).__name__, must, "an encoder", step))
    return contest.model, contest.reference


def predictor_of(model: Decoder) -> CausalModel:
    """Return what computes a model's logits as users get them: its engine, or itself."""
    engine = None if why_no_engine(model) is not None else engine_of(model)
    return model if engine is None else EngineModel(engine)


def _judge_text(gate: TextGate, contest: Contest, report: Report) -> Verdict:
    model, reference = _decoders(gate, contest)
    corpus = Corpus(
        name=gate.text, text="\n\n".join(measured_part(text) for text in texts_of(gate.text))
    )
    windows = _windows(gate, corpus, tokenizer_of(model, None, "TextGate"))
    scores = paired_text(predictor_of(model), reference, windows, progress=report)
    found = scores.measurements({**corpus.conditions(), "interval": "Student's over windows"})
    figures = {item.name: item for item in found}
    limits = [
        _at_most(figures["perplexity_ratio"], gate.most_perplexity_ratio),
        _at_most(figures["kl_divergence"], gate.most_divergence),
        _at_least(figures["top1_agreement"], gate.least_agreement),
    ]
    return _verdict(gate.kind, limits, found)


def _windows(gate: TextGate, corpus: Corpus, tokenizer: TextTokenizer) -> torch.Tensor:
    ids = torch.tensor(tokenizer.encode(corpus.text)[: gate.tokens])
    count = len(ids) // gate.window
    if count < 2:
        must = f"at least {2 * gate.window} tokens long in the part that is measured"
        raise ConfigError(describe("text", "TextGate", must, f"{len(ids)} tokens of {gate.text}"))
    return ids[: count * gate.window].view(count, gate.window)


def _judge_task(gate: TaskGate, contest: Contest, report: Report) -> Verdict:
    model, reference = _decoders(gate, contest)
    items = (
        next_sentence_items(gate.num_items, seed=gate.seed)
        if gate.items is None
        else read_choice_items(gate.items)[: gate.num_items]
    )
    ours, theirs = (
        multiple_choice(each, items, progress=report).items
        for each in (predictor_of(model), reference)
    )
    pairs = PairedItems.of_choices(ours, theirs)
    found = pairs.measurements({"items_file": gate.items, "seed": gate.seed})
    figures = {item.name: item for item in found}
    limits = [
        _at_most(figures["accuracy_loss"], gate.most_loss),
        _at_least(figures["ability_kept"], gate.least_kept),
    ]
    return _verdict(gate.kind, limits, found)


def _judge_labels(gate: LabelGate, contest: Contest, report: Report) -> Verdict:
    model, reference = contest.model, contest.reference
    if not isinstance(model, Encoder) or not isinstance(reference, Encoder):
        must = "an encoder that classifies"
        raise ConfigError(describe("model", "LabelGate", must, "a decoder"))
    texts = read_labelled(gate.data, text=gate.text, label=gate.label)
    ours, theirs = (
        accuracy(each.classify, texts, progress=report).is_right for each in (model, reference)
    )
    pairs = PairedItems(
        np.array(theirs, float),
        np.array(ours, float),
        np.full(len(texts), 1 / len(reference.config.labels)),
    )
    found = pairs.measurements({"data": gate.data})
    figures = {item.name: item for item in found}
    limits = [
        _at_most(figures["accuracy_loss"], gate.most_loss),
        _at_least(figures["ability_kept"], gate.least_kept),
    ]
    return _verdict(gate.kind, limits, found)


def _judge_size(gate: SizeGate, contest: Contest) -> Verdict:
    before = contest.reference_parameters * (4 if gate.against == "float32" else 2)
    share = Measurement(
        name="size_share",
        value=contest.num_bytes / before,
        unit="1",
        conditions={"bytes": contest.num_bytes, "against": gate.against, "bytes_before": before},
    )
    return _verdict(gate.kind, [_at_most(share, gate.most_share)], [share])


def _judge_speed(gate: SpeedGate, contest: Contest, report: Report) -> Verdict:
    model, _ = _decoders(gate, contest)
    assert isinstance(contest.replaced, Decoder)
    found = speed_side_by_side(
        {"compressed": model, "replaced": contest.replaced},
        num_prompt_tokens=gate.prompt_tokens,
        num_new_tokens=gate.new_tokens,
        num_repeats=gate.rounds,
        progress=report,
    )
    figures = {item.name: item for item in found}
    limits = [
        _median_at_least(figures["decode_speed_ratio"], gate.least_decode),
        _median_at_least(figures["prefill_speed_ratio"], gate.least_prefill),
    ]
    return _verdict(gate.kind, limits, found)


_Limit = tuple[bool, str]
"""Whether it is kept, and what was found in words."""


def _at_most(item: Measurement, limit: float | None) -> _Limit | None:
    if limit is None:
        return None
    worst = item.value if item.spread is None else item.spread.high
    return worst <= limit, f"{_shown(item)}, at most {limit:g}{_unsure(item, limit)}"


def _at_least(item: Measurement, limit: float | None) -> _Limit | None:
    if limit is None:
        return None
    worst = item.value if item.spread is None else item.spread.low
    return worst >= limit, f"{_shown(item)}, at least {limit:g}{_unsure(item, limit)}"


def _median_at_least(item: Measurement, limit: float) -> _Limit:
    return item.value >= limit, f"{_shown(item)}, at least {limit:g}"


def _shown(item: Measurement) -> str:
    if item.spread is None:
        return f"{item.name} {item.value:.4g}"
    return f"{item.name} {item.value:.4g} ({item.spread.low:.4g} to {item.spread.high:.4g})"


def _unsure(item: Measurement, limit: float) -> str:
    """Return what to do where the limit lies within the interval: more of what was counted."""
    counted = next((name for name in ("windows", "items") if name in item.conditions), None)
    spread = item.spread
    if spread is None or counted is None or not spread.low < limit < spread.high:
        return ""
    distance, half = abs(item.value - limit), (spread.high - spread.low) / 2
    if distance == 0 or not math.isfinite(distance):
        return "; too near to tell"
    needed = math.ceil(item.conditions[counted] * (half / distance) ** 2)
    return f"; too few to tell: about {needed} {counted} would"


def _verdict(kind: str, limits: Sequence[_Limit | None], found: Sequence[Measurement]) -> Verdict:
    asked = [limit for limit in limits if limit is not None]
    return Verdict(
        gate=kind,
        holds=all(holds for holds, _ in asked),
        words="; ".join(words for _, words in asked),
        measurements=tuple(found),
    )


def gate_settings(gates: Sequence[GateConfig]) -> list[dict[str, Any]]:
    """Return gates as JSON-ready values."""
    return [gate.to_dict() for gate in gates]
