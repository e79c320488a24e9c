"""What attention that leaves something out loses: documents, copies, needles.

Every token sees what it would see while it is generated. Dense attention is the engine's own in the
same scheme.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepseek.cli.attention_contenders import Trial, new_engine, read, routing_of
from deepseek.cli.output import Progress
from deepseek.errors import ConfigError, describe
from deepseek.evaluate import copy_accuracy, needle
from deepseek.evaluate.corpus import Corpus
from deepseek.evaluate.intervals import student_quantile
from deepseek.generate.engine import PAGE_SIZE, Engine
from deepseek.models import Decoder
from deepseek.records import Measurement, Spread

DISTANCES = (0.25, 0.5, 0.9)
"""From a passage to its copy, as shares of the length."""


def attention_quality(
    model: Decoder, corpus: Corpus, trial: Trial, progress: Progress
) -> list[Measurement]:
    """Return how each contender predicts the second halves of documents, beside dense attention;
    how many tokens of copied passages it has right, and which needles it finds."""
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(corpus.text)
    names = ("dense", *(name for name in trial.contenders if name != "dense"))
    figures, whole = [], len(trial.lengths) * len(names)
    for length in trial.lengths:
        pieces = documents(tokens, length, trial.documents)
        dense: list[torch.Tensor] = []
        losses: list[float] = []
        for name in names:
            progress(f"{length} tokens, {name}: documents", len(figures) / 8 / whole)
            engine = new_engine(model, trial, routing_of(name, length))
            about = {"contender": name, "length": length, "scheme": trial.scheme}
            about |= {"threads": trial.threads, **corpus.conditions()}
            rows = read_documents(engine, pieces, dense)
            losses = losses or [row.loss for row in rows]
            figures += _document_figures(rows, losses, about)
            progress(f"{length} tokens, {name}: copies and needles", len(figures) / 8 / whole)
            figures += _retrieval_figures(engine, corpus, length, trial.probes, about)
            del engine
    return figures


def documents(tokens: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Return pieces of a text, spread evenly over it; they overlap where it is short.

    Raises:
        ConfigError: the text is shorter than one piece.
    """
    if len(tokens) < length:
        must = f"at least {length} tokens long"
        raise ConfigError(describe("text", "routing", must, f"{len(tokens)} tokens"))
    spare = len(tokens) - length
    starts = [spare * number // max(1, count - 1) for number in range(count)]
    return [list(tokens[start : start + length]) for start in starts]


@dataclasses.dataclass(frozen=True)
class Read:
    """How a document's second half was predicted."""

    loss: float
    divergence: float
    seen: float
    """Tokens that the last token of a block sees, on average over layers, KV heads and blocks."""


def read_documents(
    engine: Engine, pieces: Sequence[Sequence[int]], dense: list[torch.Tensor]
) -> list[Read]:
    """Return how an engine predicts the second halves; the first engine's chances become those of
    `dense`."""
    found = []
    for number, piece in enumerate(pieces):
        half = len(piece) // 2
        logits, pages, _ = read(engine, piece, every=True)
        logits = torch.from_numpy(logits)[half:-1]
        seen = pages.mean_chosen() * PAGE_SIZE if engine.routing else float(len(piece))
        chances = logits.log_softmax(-1)
        if len(dense) == number:
            dense.append(chances.bfloat16())
        reference = dense[number].float()
        targets = torch.tensor(piece[half + 1 :])[:, None]
        loss = -chances.gather(1, targets).mean().item()
        kl = (reference.exp() * (reference - chances)).sum(-1).mean().item()
        found.append(Read(loss, kl, seen))
    return found


class EngineModel:
    """An engine as what the measurements of `deepseek.evaluate` call."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokenizer, self.bundle = engine, engine.tokenizer, engine.bundle

    def __call__(self, input_ids: torch.Tensor, attention_mask: object = None) -> torch.Tensor:
        """Return the logits [1, T, vocab] of one row."""
        return torch.from_numpy(read(self.engine, input_ids[0].tolist(), every=True)[0])[None]


def _document_figures(
    rows: Sequence[Read], dense: Sequence[float], about: Mapping[str, Any]
) -> list[Measurement]:
    changes = [row.loss - loss for row, loss in zip(rows, dense, strict=True)]
    mean = statistics.fmean(changes)
    spread = None
    if len(rows) > 1:
        half = student_quantile(len(rows) - 1) * statistics.stdev(changes) / len(rows) ** 0.5
        spread = Spread(kind="ci95", low=math.exp(mean - half), high=math.exp(mean + half))
    conditions = {**about, "documents": len(rows)}
    perplexity = math.exp(statistics.fmean(row.loss for row in rows))
    divergence = statistics.fmean(row.divergence for row in rows)
    return [
        Measurement(name="perplexity", value=perplexity, unit="1", conditions=conditions),
        Measurement(
            name="perplexity_ratio",
            value=math.exp(mean),
            unit="1",
            spread=spread,
            conditions=conditions,
        ),
        Measurement(name="kl_divergence", value=divergence, unit="nats", conditions=conditions),
        Measurement(
            name="tokens_seen",
            value=statistics.fmean(row.seen for row in rows),
            unit="tokens",
            conditions=conditions,
        ),
    ]


def _retrieval_figures(
    engine: Engine, corpus: Corpus, length: int, probes: int, about: Mapping[str, Any]
) -> list[Measurement]:
    model, found = EngineModel(engine), []
    for share in DISTANCES:
        distance = int(share * (length - 128))
        found += copy_accuracy(
            model, length=length, distance=distance, num_items=probes, text=corpus
        ).measurements
    for keys in (1, 4):
        found += needle(
            model, length=length, num_keys=keys, num_items=probes, text=corpus
        ).measurements
    return [dataclasses.replace(each, conditions={**about, **each.conditions}) for each in found]
