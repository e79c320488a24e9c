"""What attention that leaves something out loses: documents, copies, needles, variables.

Every token sees what it would see while it is generated. Dense attention is the engine's own in the
same scheme. Each document and each kind of probe is a step of its own, kept as soon as it is
measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek.cli.attention_contenders import Trial, new_engine, read, routing_of
from deepseek.cli.kept import Kept
from deepseek.cli.output import Progress
from deepseek.errors import ConfigError, describe
from deepseek.evaluate import copy_accuracy, needle, variable_tracking
from deepseek.evaluate.corpus import Corpus
from deepseek.evaluate.intervals import NUM_RESAMPLES, bootstrap_ratio, student_quantile
from deepseek.evaluate.probes import RetrievalResult
from deepseek.generate.engine import PAGE_SIZE, Engine
from deepseek.models import Decoder
from deepseek.ops.routing import Routing
from deepseek.records import Measurement, Spread

DENSE = "dense"
ANSWER_TOKENS = 256
"""Tokens at the end of a probe whose logits are computed; no answer is longer."""
ROWS_AT_ONCE = 256
"""Tokens whose chances are compared at a time."""

Probe = Callable[["EngineModel", Corpus, int, int], RetrievalResult]
"""Takes a model, the text, tokens of a sequence, and how many of them."""


def _copy(share: float) -> Probe:
    def probe(model: EngineModel, corpus: Corpus, length: int, items: int) -> RetrievalResult:
        distance = int(share * (length - 128))
        return copy_accuracy(model, length=length, distance=distance, num_items=items, text=corpus)

    return probe


def _needle(keys: int) -> Probe:
    def probe(model: EngineModel, corpus: Corpus, length: int, items: int) -> RetrievalResult:
        return needle(model, length=length, num_keys=keys, num_items=items, text=corpus)

    return probe


def _tracking(chains: int) -> Probe:
    def probe(model: EngineModel, corpus: Corpus, length: int, items: int) -> RetrievalResult:
        return variable_tracking(
            model, length=length, num_chains=chains, num_items=items, text=corpus
        )

    return probe


PROBES: dict[str, Probe] = {
    "copy, near": _copy(0.25),
    "copy, half way": _copy(0.5),
    "copy, far": _copy(0.9),
    "needle, one key": _needle(1),
    "needle, four keys": _needle(4),
    "variables": _tracking(1),
}
"""Near, half way and far: a quarter, a half and nine tenths of the length."""


def attention_quality(
    model: Decoder, corpora: Sequence[Corpus], trial: Trial, kept: Kept, progress: Progress
) -> list[Measurement]:
    """Return how each contender predicts the second halves of documents, beside dense attention;
    how many tokens of copied passages it has right, which needles and variables it finds, and which
    share that is of what dense attention has right."""
    assert model.tokenizer is not None
    texts = [model.tokenizer.encode(each.text) for each in corpora]
    corpus = joined(corpora)
    figures: list[Measurement] = []
    pieces = {length: documents(texts, length, trial.documents) for length in trial.lengths}
    for place, length in enumerate(trial.lengths):
        judge = Judge(model, trial, length, kept)

        def tell(what: str, share: float, place: int = place, length: int = length) -> None:
            progress(f"{length} tokens: {what}", (place + share) / len(trial.lengths))

        rows = judge.documents(pieces[length], tell)
        about = {"length": length, "scheme": trial.scheme, "threads": trial.threads}
        about |= corpus.conditions()
        right: dict[str, dict[str, list[int]]] = {}
        for name in judge.names:
            where = {**about, "contender": name}
            figures += _document_figures(rows[name], rows[DENSE], where)
            probed, right[name] = judge.probes(name, corpus, tell)
            figures += [
                dataclasses.replace(each, conditions={**where, **each.conditions})
                for each in probed
            ]
            figures += retained(right[name], right[DENSE], where)
    return figures


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Return several texts as one."""
    return Corpus(
        name="+".join(each.name for each in corpora),
        text="\n\n".join(each.text for each in corpora),
    )


def documents(texts: Sequence[Sequence[int]], length: int, count: int) -> list[list[int]]:
    """Return pieces of some texts, spread evenly over all places where one can begin; none goes
    from one text into another, and they overlap where the texts are short.

    Raises:
        ConfigError: no text is as long as one piece.
    """
    starts = [(text, start) for text in texts for start in range(max(0, len(text) - length + 1))]
    if not starts:
        must = f"at least {length} tokens long"
        got = f"{max(map(len, texts))} tokens"
        raise ConfigError(describe("text", "routing", must, got))
    chosen = [starts[(len(starts) - 1) * n // max(1, count - 1)] for n in range(count)]
    return [list(text[start : start + length]) for text, start in chosen]


@dataclasses.dataclass(frozen=True)
class Read:
    """How a document's second half was predicted."""

    loss: float
    divergence: float
    seen: float
    """Tokens that the last token of a block sees, on average over layers, KV heads and the blocks
    that do not see all; the length where all do."""


class Judge:
    """The contenders at one length; an engine is built when it is needed and held.

    Args:
        model: whose attention is judged.
        trial: how.
        length: tokens of a text.
        kept: what was measured before.
    """

    def __init__(self, model: Decoder, trial: Trial, length: int, kept: Kept) -> None:
        self._model, self._trial, self._length, self._kept = model, trial, length, kept
        others = [name for name in trial.contenders if name not in (DENSE, "recent")]
        self.names = [DENSE, *others, *(["recent"] if "recent" in trial.contenders else [])]
        self._peer = next((name for name in others if name.startswith("routed")), None)
        self._seen: float | None = None
        self._engines: dict[str, Engine] = {}

    def documents(
        self, pieces: Sequence[Sequence[int]], tell: Callable[[str, float], None]
    ) -> dict[str, list[Read]]:
        """Return how each contender predicts each document; "recent" sees as many tokens of it as
        the first routed one does."""
        rows: dict[str, list[Read]] = {name: [] for name in self.names}
        for number, piece in enumerate(pieces):
            dense = functools.cache(functools.partial(self._second_half, DENSE, piece))
            for name in self.names:
                tell(f"document {number + 1}, {name}", number / len(pieces) / 2)
                found = self._kept.step(
                    [*self._key(name), "document", number],
                    functools.partial(self._judged, name, piece, dense),
                )
                rows[name].append(Read(**found))
                if name == self._peer:
                    self._seen = rows[name][-1].seen
        if self._peer is not None:
            self._seen = statistics.fmean(row.seen for row in rows[self._peer])
        return rows

    def probes(
        self, name: str, corpus: Corpus, tell: Callable[[str, float], None]
    ) -> tuple[list[Measurement], dict[str, list[int]]]:
        """Return what the probes measure of a contender, and of each kind the answer tokens that it
        has right, item by item."""
        measured: list[Measurement] = []
        right: dict[str, list[int]] = {}
        place = self.names.index(name)
        for number, (what, probe) in enumerate(PROBES.items()):
            tell(f"{what}, {name}", 0.5 + (place + number / len(PROBES)) / len(self.names) / 2)
            found = self._kept.step(
                [*self._key(name), what], functools.partial(self._probed, name, probe, corpus)
            )
            measured += map(Measurement.from_dict, found["measurements"])
            right[what] = found["right"]
        return measured, right

    def _key(self, name: str) -> list[object]:
        routing = self._routing(name)
        return [self._length, name, None if routing is None else routing.to_dict()]

    def _routing(self, name: str) -> Routing | None:
        return routing_of(name, self._length, self._seen)

    def _engine(self, name: str) -> Engine:
        routing = self._routing(name)
        held = self._engines.get(name)
        if held is None or held.routing != routing:
            self._engines.pop(name, None)
            self._engines[name] = new_engine(self._model, self._trial, routing)
        return self._engines[name]

    def _second_half(self, name: str, piece: Sequence[int]) -> tuple[Tensor, float]:
        """Return the logarithms of the chances in a document's second half, and the tokens seen."""
        engine = self._engine(name)
        logits, pages, _ = read(engine, piece, logits_from=len(piece) // 2)
        seen = pages.mean_chosen() * PAGE_SIZE or float(len(piece))
        chances = torch.from_numpy(logits)[:-1]
        for rows in chances.split(ROWS_AT_ONCE):
            rows.copy_(rows.log_softmax(-1))
        return chances, seen

    def _judged(
        self, name: str, piece: Sequence[int], dense: Callable[[], tuple[Tensor, float]]
    ) -> dict[str, float]:
        reference, _ = dense()
        chances, seen = dense() if name == DENSE else self._second_half(name, piece)
        targets = torch.tensor(piece[len(piece) // 2 + 1 :])[:, None]
        divergence = sum(
            float((one.exp() * (one - other)).sum())
            for one, other in zip(
                reference.split(ROWS_AT_ONCE), chances.split(ROWS_AT_ONCE), strict=True
            )
        )
        loss = -chances.gather(1, targets).double().mean().item()
        return dataclasses.asdict(Read(loss, divergence / len(chances), seen))

    def _probed(self, name: str, probe: Probe, corpus: Corpus) -> dict[str, Any]:
        result = probe(EngineModel(self._engine(name)), corpus, self._length, self._trial.probes)
        return {
            "measurements": [each.to_dict() for each in result.measurements],
            "right": [sum(rank == 0 for rank in item.ranks) for item in result.items],
        }


class EngineModel:
    """An engine as what the measurements of `deepseek.evaluate` call, which look at the last
    `ANSWER_TOKENS` positions of a probe alone: no other logits are computed."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokenizer, self.bundle = engine, engine.tokenizer, engine.bundle

    def __call__(self, input_ids: Tensor, attention_mask: object = None) -> Tensor:
        """Return the logits [1, ANSWER_TOKENS, vocab] of the last tokens of one row."""
        tokens = input_ids[0].tolist()
        start = max(0, len(tokens) - ANSWER_TOKENS)
        return torch.from_numpy(read(self.engine, tokens, logits_from=start)[0])[None]


def _document_figures(
    rows: Sequence[Read], dense: Sequence[Read], about: Mapping[str, Any]
) -> list[Measurement]:
    changes = [row.loss - other.loss for row, other in zip(rows, dense, strict=True)]
    conditions = {**about, "documents": len(rows), "interval": "Student's t over documents"}
    mean, ratio_spread = _mean(changes)
    if ratio_spread is not None:
        low, high = math.exp(ratio_spread.low), math.exp(ratio_spread.high)
        ratio_spread = Spread(kind="ci95", low=low, high=high)
    divergence, divergence_spread = _mean([row.divergence for row in rows])
    seen, seen_spread = _mean([row.seen for row in rows])
    perplexity = math.exp(statistics.fmean(row.loss for row in rows))
    figures = (
        ("perplexity", perplexity, "1", None),
        ("perplexity_ratio", math.exp(mean), "1", ratio_spread),
        ("kl_divergence", divergence, "nats", divergence_spread),
        ("tokens_seen", seen, "tokens", seen_spread),
    )
    return [
        Measurement(name=name, value=value, unit=unit, spread=spread, conditions=conditions)
        for name, value, unit, spread in figures
    ]


def _mean(values: Sequence[float]) -> tuple[float, Spread | None]:
    """Return a mean and its interval by Student's t; None for a single value, or where all are
    the same."""
    mean = statistics.fmean(values)
    if len(set(values)) < 2:
        return mean, None
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, Spread(kind="ci95", low=mean - half, high=mean + half)


def retained(
    right: Mapping[str, Sequence[int]],
    dense: Mapping[str, Sequence[int]],
    about: Mapping[str, Any],
) -> list[Measurement]:
    """Return the share of dense attention's right answer tokens that a contender has, by kind of
    probe, and over the kinds their mean; a kind of which dense attention has none right is left
    out."""
    found = []
    for what, counts in right.items():
        ours, theirs = (np.array(each, np.float64) for each in (counts, dense[what]))
        if theirs.sum() == 0:
            continue
        interval = f"bootstrap over items, {NUM_RESAMPLES} resamples"
        spread = bootstrap_ratio(ours, theirs) if theirs.min() > 0 else None
        found.append(
            Measurement(
                name="retained",
                value=float(ours.sum() / theirs.sum()),
                unit="1",
                spread=spread,
                conditions={**about, "task": what, "items": len(ours), "interval": interval},
            )
        )
    if found:
        mean = statistics.fmean(each.value for each in found)
        where = {**about, "tasks": len(found)}
        found.append(Measurement(name="retained_mean", value=mean, unit="1", conditions=where))
    return found
