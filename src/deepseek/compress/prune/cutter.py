"""Cuts a model to any shape, and measures what that loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.compress.calibration import Batch, Calibration, calibration_batches
from deepseek.compress.prune.cut import anatomy, cut, keep_best, steady_norms
from deepseek.compress.prune.importance import Importance, layer_scores, run, unit_scores
from deepseek.compress.prune.shape import Shape
from deepseek.compress.work import Work
from deepseek.models import Decoder, Encoder

_PROBED_TOKENS = 2048
"""Of the calibration, on which the loss of a cut is measured."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A model that was cut."""

    model: Decoder | Encoder
    importance_kept: float
    """Share of the scores that is kept, meant over the groups that were cut, and the layers."""
    width: Tensor | None
    """Int64: channels of the states that are kept; None for all."""


class Cutter:
    """What is known of a model to cut it: its groups, scores, and loss."""

    def __init__(
        self,
        model: Decoder | Encoder,
        importance: Importance,
        calibration: Calibration,
        work: Work,
    ) -> None:
        """Trace and score a model.

        Args:
            model: stays as it is.
            importance: which score its units have.
            calibration: samples for scores and losses.
            work: is told of progress, and asked whether to go on.

        Raises:
            ConfigError: there is no text, or the score is not defined for the model.
        """
        self.model, self._work = model, work
        self.unit = "nats" if isinstance(model, Decoder) else "1"
        batches = calibration_batches(model, calibration)
        work.report("tracing", None)
        self.anatomy = anatomy(model)
        work.report("scores of units and layers", None)
        self._scores = unit_scores(model, self.anatomy, importance, batches, work.goes_on)
        self._layer_scores = layer_scores(model, batches, work.goes_on)
        self._probes = _first(batches, _PROBED_TOKENS)
        is_encoder = isinstance(model, Encoder)
        self._states = [run(model, batch) for batch in self._probes] if is_encoder else []
        self.whole_loss = self.loss(Cut(model, 1.0, None))

    def cut(self, shape: Shape) -> Cut:
        """Return the model of a shape.

        Raises:
            ConfigError: it cannot be come to.
            FormatError: the model's family cannot express it.
        """
        kept = keep_best(self.model, self.anatomy, self._scores, self._layer_scores, shape)
        smaller = cut(self.model, self.anatomy, kept)
        steady_norms(self.model, smaller, self.anatomy, kept, self._run_probes)
        pairs = [*zip(self._scores, kept.units, strict=True)]
        pairs.append((self._layer_scores, torch.tensor(kept.layers)))
        shares = [
            float(score[units].sum() / score.sum().clamp_min(1e-30))
            for score, units in pairs
            if len(units) < len(score)
        ]
        by_part = dict(zip(self.anatomy.parts, kept.units, strict=True))
        kept_share = sum(shares) / len(shares) if shares else 1.0
        return Cut(smaller, kept_share, by_part.get("width"))

    def loss_of(self, shape: Shape) -> float:
        """Return the loss of the model of a shape."""
        self._work.goes_on()
        return self.loss(self.cut(shape))

    def loss(self, done: Cut) -> float:
        """Return a decoder's mean loss on the probes, in nats; an encoder's mean of one minus the
        cosine between its states and those of the whole model, on the channels that it kept."""
        if isinstance(done.model, Decoder):
            losses, counts = _decoder_losses(done.model, self._probes)
        else:
            losses, counts = self._encoder_losses(done)
        return sum(losses) / sum(counts)

    def _encoder_losses(self, done: Cut) -> tuple[list[float], list[float]]:
        losses, counts = [], []
        for batch, states in zip(self._probes, self._states, strict=True):
            kept = states if done.width is None else states[..., done.width]
            change = 1 - F.cosine_similarity(run(done.model, batch), kept, dim=-1)
            mask = batch.attention_mask
            mask = torch.ones_like(change) if mask is None else mask
            losses.append(float((change * mask).sum()))
            counts.append(float(mask.sum()))
        return losses, counts

    def _run_probes(self) -> None:
        for batch in self._probes:
            run(self.model, batch)


def _decoder_losses(model: Decoder, probes: Sequence[Batch]) -> tuple[list[float], list[float]]:
    with torch.no_grad():
        counts = [float(batch.input_ids[:, 1:].numel()) for batch in probes]
        means = [float(model.loss(batch.input_ids, batch.input_ids)) for batch in probes]
    return [mean * count for mean, count in zip(means, counts, strict=True)], counts


def _first(batches: Sequence[Batch], most_tokens: int) -> list[Batch]:
    """Return the first batches, until they have so many tokens; at least one."""
    found: list[Batch] = []
    count = 0
    for batch in batches:
        if count >= most_tokens:
            break
        found.append(batch)
        count += batch.input_ids.numel()
    return found
