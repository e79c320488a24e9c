"""Two models on the same text and the same items: what one loses against the other, with the
interval that pairing allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import CausalModel, Progress, device_of, measuring, position_logits
from deepseek.evaluate.choice import ScoredChoice
from deepseek.evaluate.classification import difference_interval
from deepseek.evaluate.intervals import (
    FloatArray,
    bootstrap_ratio,
    clustered_wilson,
    student_quantile,
)
from deepseek.records import Measurement, Spread


@dataclasses.dataclass(frozen=True)
class PairedText:
    """How two models predict the same windows."""

    reference_losses: FloatArray
    """Mean loss of each window under the reference [windows], in nats."""
    losses: FloatArray
    """The same under the model."""
    divergences: FloatArray
    """Mean KL(reference || model) of each window [windows], in nats a token."""
    agreements: FloatArray
    """Share of each window's tokens behind which both find the same one likeliest [windows]."""
    window_tokens: int

    def measurements(self, about: Mapping[str, Any]) -> list[Measurement]:
        """Return `perplexity`, `reference_perplexity`, `perplexity_ratio`, `kl_divergence` and
        `top1_agreement`, with 95 % intervals over the windows."""
        change = self.losses - self.reference_losses
        conditions = {**about, "windows": len(change), "window_tokens": self.window_tokens}
        sizes = np.full(len(change), float(self.window_tokens - 1))
        rows = [
            ("perplexity", "1", _raised(self.losses)),
            ("reference_perplexity", "1", _raised(self.reference_losses)),
            ("perplexity_ratio", "1", _raised(change)),
            ("kl_divergence", "nats/token", _mean(self.divergences)),
            (
                "top1_agreement",
                "1",
                (
                    float(self.agreements.mean()),
                    clustered_wilson(self.agreements * sizes, sizes),
                ),
            ),
        ]
        return [
            Measurement(name=name, value=value, unit=unit, spread=spread, conditions=conditions)
            for name, unit, (value, spread) in rows
        ]


def paired_text(
    model: CausalModel,
    reference: CausalModel,
    windows: Tensor,
    *,
    progress: Progress | None = None,
) -> PairedText:
    """Let two models predict the same windows, each from its own start.

    Args:
        model: the one that was changed.
        reference: the one that it should still be like.
        windows: int64 [n, T], at least two, for an interval.
        progress: called after each window.

    Raises:
        ConfigError: fewer than two windows.
    """
    if len(windows) < 2:
        raise ConfigError(describe("windows", "paired_text", "at least two", len(windows)))
    rows = []
    with measuring(model), measuring(reference):
        for place, window in enumerate(windows):
            expected = _log_chances(reference, window)
            rows.append(_compare(expected, _log_chances(model, window), window[1:]))
            if progress is not None:
                progress("comparing", (place + 1) / len(windows))
    columns = np.array(rows).T
    return PairedText(*columns, window_tokens=windows.shape[1])


def _log_chances(model: CausalModel, window: Tensor) -> Tensor:
    """Return the logarithms of a model's chances of each next token but the last [T - 1, V]."""
    ids = window[None].to(device_of(model))
    return position_logits(model, ids, 0)[0, :-1].float().log_softmax(-1).cpu()


def _compare(expected: Tensor, found: Tensor, targets: Tensor) -> tuple[float, ...]:
    picked = targets[:, None]
    losses = [-chances.gather(1, picked).mean().item() for chances in (expected, found)]
    divergence = (expected.exp() * (expected - found)).sum(-1, dtype=torch.float64).mean().item()
    agreement = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
    return losses[0], losses[1], divergence, agreement


@dataclasses.dataclass(frozen=True)
class PairedItems:
    """Which of the same items two models got right."""

    reference_is_right: FloatArray
    """1 or 0 for each item [items]."""
    is_right: FloatArray
    """The same of the model."""
    chances: FloatArray
    """Of each item, to be right by guessing [items]."""

    @classmethod
    def of_choices(
        cls, model: Sequence[ScoredChoice], reference: Sequence[ScoredChoice]
    ) -> PairedItems:
        """Return how two models chose in the same items, the likeliest choice counting."""
        pairs = list(zip(model, reference, strict=True))
        return cls(
            np.array([float(theirs.chosen == theirs.answer) for _, theirs in pairs]),
            np.array([float(ours.chosen == ours.answer) for ours, _ in pairs]),
            np.array([1 / len(theirs.log_likelihoods) for _, theirs in pairs]),
        )

    def loss(self) -> tuple[float, Spread]:
        """Return the share of items that is lost, net, and its 95 % interval, by
        `difference_interval`."""
        ours, theirs = self.is_right, self.reference_is_right
        return float(theirs.mean() - ours.mean()), difference_interval(ours, theirs)

    def kept(self) -> tuple[float, Spread | None]:
        """Return the share of the reference's ability that is kept, what guessing gives subtracted
        from both, and its 95 % interval by a bootstrap over the items."""
        ours, theirs = self.is_right - self.chances, self.reference_is_right - self.chances
        total = float(theirs.sum())
        value = float(ours.sum()) / total if total else math.nan
        return value, bootstrap_ratio(ours, theirs)

    def measurements(self, about: Mapping[str, Any]) -> list[Measurement]:
        """Return `accuracy`, `reference_accuracy`, `accuracy_loss` and `ability_kept`."""
        conditions = {**about, "items": len(self.is_right), "chance": float(self.chances.mean())}
        loss, kept = self.loss(), self.kept()
        rows = [
            ("accuracy", (float(self.is_right.mean()), None)),
            ("reference_accuracy", (float(self.reference_is_right.mean()), None)),
            ("accuracy_loss", loss),
            ("ability_kept", kept),
        ]
        return [
            Measurement(name=name, value=value, unit="1", spread=spread, conditions=conditions)
            for name, (value, spread) in rows
        ]


def _mean(values: FloatArray) -> tuple[float, Spread]:
    """Return the mean over windows and Student's 95 % interval."""
    centre = float(values.mean())
    half = student_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return centre, Spread("ci95", centre - half, centre + half)


def _raised(values: FloatArray) -> tuple[float, Spread]:
    """Return exp of the mean over windows, and of its interval."""
    value, spread = _mean(values)
    return math.exp(value), Spread(spread.kind, math.exp(spread.low), math.exp(spread.high))
