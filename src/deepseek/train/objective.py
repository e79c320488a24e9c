"""What the steps of a stage lower: the seam at which a floor above brings a loss of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek.models import Decoder, Encoder
from deepseek.ops.cross_entropy import IGNORED
from deepseek.train.config import Stage
from deepseek.train.teacher import taught_loss


class Part(NamedTuple):
    """Samples of a step that go through the model together."""

    tokens: Tensor
    """int64 [B, T]."""
    counted: Tensor
    """bool [B, T], the tokens to be predicted; never the first of a row."""
    is_taught: Tensor
    """bool [B], rows of sources whose target is the teacher."""
    step: int
    """Of the stage, from 0; all parts of a step are computed with the same weights."""


class Objective(Protocol):
    """A loss, and what is trained beside the model for it.

    What `begin` adds to the model as a module is trained, checkpointed and restored with it; by
    `end` nothing of it is left, and the model is written as a bundle.
    """

    def begin(self, model: Decoder | Encoder) -> None:
        """Add to the model, in place, what is trained along; the same at every start."""
        ...

    def loss(self, model: Decoder | Encoder, part: Part) -> Tensor:
        """Return the sum of the losses of a part's counted tokens, float32 scalar. The model is
        called for it under autocast where the stage says so."""
        ...

    def end(self, model: Decoder | Encoder) -> None:
        """Take out what was added."""
        ...


@dataclasses.dataclass(frozen=True)
class NextTokens:
    """Cross-entropy of the tokens, and the divergence from a teacher in rows that it teaches."""

    exit_weights: Mapping[int, float] | None = None
    """Of the losses behind some layers (`Decoder.loss`)."""
    teacher: Decoder | None = None

    @classmethod
    def of(cls, stage: Stage, model: Decoder | Encoder, teacher: Decoder | None) -> NextTokens:
        """Return what a stage asks for of a decoder.

        Raises:
            ConfigError: a layer of the exit loss is not before the model's end.
        """
        exits = stage.exit_loss
        return cls(None if exits is None else exits.weights(model.config.num_layers), teacher)

    def begin(self, model: Decoder | Encoder) -> None:
        """Add nothing."""

    def loss(self, model: Decoder | Encoder, part: Part) -> Tensor:
        """Return the sum of the losses of a part's counted tokens in nats, float32 scalar."""
        assert isinstance(model, Decoder)
        tokens, counted = part.tokens, part.counted
        if self.teacher is not None and bool(part.is_taught.any()):
            return taught_loss(model, self.teacher, tokens, counted, part.is_taught)
        labels = torch.where(counted, tokens, IGNORED)
        return model.loss(tokens, labels, self.exit_weights) * counted.sum()

    def end(self, model: Decoder | Encoder) -> None:
        """Take out nothing."""
