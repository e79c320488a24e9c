"""What of a teacher is imitated, and how far a model is from it."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek.compress.distil.hidden import even_pairs, hidden_error, insert_maps
from deepseek.compress.distil.relations import (
    num_relation_heads,
    projections,
    relation_divergence,
    watched,
)
from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder
from deepseek.ops.cross_entropy import IGNORED, linear_cross_entropy
from deepseek.ops.distillation import linear_divergence
from deepseek.train import Part

LESSON = "lesson"
"""Name of the module that stands in the model while it learns."""
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imitation(Config):
    """The parts of a distance from a teacher; what is lowered is their sum, each times its weight,
    as a mean over tokens.

    States are numbered as passes return them: 0 is the embedding's output, n that of layer n.
    """

    logits: float | None = None
    """Of KL(teacher || model) of the next token, or of a text's label at each of its tokens. None
    for 1 with a decoder or a classifier; another encoder has none."""
    tokens: float = 0.0
    """Of the cross-entropy of the text's own next token; an encoder has none."""
    temperature: float = 1.0
    """Of the logits of both."""
    hidden: float | None = None
    """Of the relative squared distance of hidden states. None for 0 with a decoder, 1 with an
    encoder."""
    pairs: tuple[Pair, ...] | None = None
    """Which state is to be like which of the teacher's; None for all states, spread evenly over
    the teacher's."""
    relations: float = 0.0
    """Of the divergence of attention relations."""
    related: Pair | None = None
    """The layer, counted from 1, and the teacher's, whose relations are compared; None for the
    last of each."""
    relation_heads: int | None = None
    """Into how many heads queries, keys and values are cut for it; None for the most that divide
    all of them, up to 16."""

    def __post_init__(self) -> None:
        for name in ("logits", "tokens", "hidden", "relations"):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < math.inf:
                raise ConfigError(describe(name, "Imitation", "from 0 on", weight))
        if not 0 < self.temperature < math.inf:
            raise ConfigError(describe("temperature", "Imitation", "positive", self.temperature))

    def of(self, model: Decoder | Encoder) -> Imitation:
        """Return it with all weights said, as they are for a kind of model.

        Raises:
            ConfigError: nothing would be imitated, or logits that the model has not.
        """
        is_decoder = isinstance(model, Decoder)
        has_logits = isinstance(model, Decoder) or model.classifier is not None
        if (self.logits and not has_logits) or (self.tokens and not is_decoder):
            got = f"{self.logits} and {self.tokens}"
            must = "0 for an encoder (logits may be of one with labels)"
            raise ConfigError(describe("logits and tokens", "Imitation", must, got))
        logits = float(has_logits) if self.logits is None else self.logits
        hidden = float(not is_decoder) if self.hidden is None else self.hidden
        if not (logits or hidden or self.relations):
            must = "above 0 for logits, hidden states or relations"
            raise ConfigError(describe("weights", "Imitation", must, "none"))
        return self.replace(logits=logits, hidden=hidden)


class _Inputs(NamedTuple):
    """What a part is to a pass, of the model and of its teacher."""

    tokens: Tensor
    """int64 [B, T]."""
    mask: Tensor | None
    """bool [B, T] of tokens that are there; None for all."""
    counts: Tensor
    """bool [B, T], where states are compared."""


class _Seen(NamedTuple):
    """What a pass shows."""

    states: tuple[Tensor, ...]
    """[B, T, hidden] each; the last one alone where no others are compared."""
    projected: list[Tensor]
    """Queries, keys and values of the watched layer, [B, T, width] each."""
    labels: Tensor | None = None
    """Of an encoder with labels: their logits [B, labels]."""


class ImitationLoss:
    """The objective of learning from a teacher (`deepseek.train.Objective`)."""

    def __init__(self, imitation: Imitation, teacher: Decoder | Encoder, seed: int) -> None:
        """Prepare it.

        Args:
            imitation: what is imitated.
            teacher: not trained, in evaluation mode.
            seed: of the first maps between widths.
        """
        self._imitation, self._teacher, self._seed = imitation, teacher, seed

    def begin(self, model: Decoder | Encoder) -> None:
        """Add maps to the teacher's width to the model, where they differ.

        Raises:
            ConfigError: the model, or the teacher, has no such states, layers or heads, or other
                labels.
        """
        wants = self._wants = self._imitation.of(model)
        ours, theirs = model.config.num_layers, self._teacher.config.num_layers
        self._pairs = wants.pairs or even_pairs(ours, theirs)
        self._related = wants.related or (ours, theirs)
        _check_pairs("pairs", self._pairs, (0, 0), (ours, theirs))
        _check_pairs("related", [self._related], (1, 1), (ours, theirs))
        widths = model.config.hidden_size, self._teacher.config.hidden_size
        if wants.logits and isinstance(model, Encoder):
            _check_labels(model, self._teacher)
        if wants.hidden and widths[0] != widths[1]:
            maps = insert_maps(len(self._pairs), *widths, seed=self._seed)
            model.add_module(LESSON, maps)
        if wants.relations:
            self._heads = num_relation_heads(
                model, self._teacher, self._related, wants.relation_heads
            )

    def end(self, model: Decoder | Encoder) -> None:
        """Throw the maps away."""
        if hasattr(model, LESSON):
            delattr(model, LESSON)

    def loss(self, model: Decoder | Encoder, part: Part) -> Tensor:
        """Return the sum over a part's tokens of the distance, float32 scalar."""
        wants, inputs = self._wants, _inputs_of(model, part)
        seen = self._see(model, inputs, self._related[0])
        with torch.no_grad(), torch.autocast(part.tokens.device.type, enabled=False):
            taught = self._see(self._teacher, inputs, self._related[1])
        total = part.tokens.new_zeros((), dtype=torch.float32)
        if wants.logits and seen.labels is not None and taught.labels is not None:
            total = total + wants.logits * label_divergence(
                seen.labels, taught.labels, inputs.counts.sum(1), wants.temperature
            )
        elif wants.logits:
            assert isinstance(model, Decoder) and isinstance(self._teacher, Decoder)
            total = total + wants.logits * linear_divergence(
                seen.states[-1].flatten(0, 1),
                model.lm_head.weight,
                taught.states[-1].flatten(0, 1),
                self._teacher.lm_head.weight.detach(),
                inputs.counts.flatten(),
                wants.temperature,
            )
        if wants.tokens:
            assert isinstance(model, Decoder)
            labels = torch.where(part.counted[:, 1:], part.tokens[:, 1:], IGNORED).flatten()
            states = seen.states[-1][:, :-1].flatten(0, 1)
            total = total + wants.tokens * linear_cross_entropy(
                states, model.lm_head.weight, labels
            )
        with torch.autocast(part.tokens.device.type, enabled=False):
            if wants.hidden:
                total = total + wants.hidden * self._hidden(model, seen, taught, inputs.counts)
            if wants.relations:
                total = total + wants.relations * relation_divergence(
                    seen.projected,
                    taught.projected,
                    inputs.counts,
                    num_heads=self._heads,
                    mask=inputs.mask,
                    is_causal=isinstance(model, Decoder),
                )
        return total

    def _hidden(
        self, model: Decoder | Encoder, seen: _Seen, taught: _Seen, counts: Tensor
    ) -> Tensor:
        maps = getattr(model, LESSON, None)
        errors = []
        for number, (ours, theirs) in enumerate(self._pairs):
            states = seen.states[ours].float()
            if isinstance(maps, nn.ModuleList):
                states = maps[number](states)
            errors.append(hidden_error(states, taught.states[theirs], counts))
        return torch.stack(errors).mean()

    def _see(self, model: Decoder | Encoder, inputs: _Inputs, layer: int) -> _Seen:
        wants = self._wants
        with watched(projections(model, layer) if wants.relations else ()) as projected:
            if isinstance(model, Encoder):
                output = model(inputs.tokens, inputs.mask, output_hidden_states=True)
                return _Seen(output.hidden_states, projected, output.logits)
            if wants.hidden:
                states = model.every_state(inputs.tokens)
            else:
                states = (model.final_states(inputs.tokens),)
        return _Seen(states, projected)


def label_divergence(
    ours: Tensor, theirs: Tensor, counts: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the sum over texts of KL(teacher || model) of their label in nats, each times a count,
    at a temperature and times its square: float32 scalar.

    Source: Hinton et al. (1503.02531), section 2.

    Args:
        ours, theirs: logits [B, labels]; no gradient flows into the teacher's.
        counts: [B], of each text.
        temperature: by which the logits of both are divided, above 0.
    """
    both = (ours, theirs.detach())
    logs, target = ((each.float() / temperature).log_softmax(-1) for each in both)
    return ((target.exp() * (target - logs)).sum(-1) * counts).sum() * temperature**2


def _check_labels(model: Encoder, teacher: Decoder | Encoder) -> None:
    labels = teacher.config.labels if isinstance(teacher, Encoder) else ()
    if labels != model.config.labels:
        must = f"those of the model, {', '.join(model.config.labels)}"
        step = "Set logits: 0 to imitate its states alone"
        raise ConfigError(describe("teacher's labels", "Imitation", must, labels, step))


def _inputs_of(model: Decoder | Encoder, part: Part) -> _Inputs:
    """Return a decoder's tokens and those from which a counted one is predicted; of an encoder's
    rows, which are followed by a token of the next, the tokens that are there."""
    if isinstance(model, Decoder):
        # the last token of a row predicts nothing, but what is behind it is not compared either
        counts = torch.zeros_like(part.counted)
        counts[:, :-1] = part.counted[:, 1:]
        return _Inputs(part.tokens, None, counts)
    mask = part.counted[:, :-1].clone()
    mask[:, 0] = True
    longest = int(mask.any(0).nonzero().max()) + 1
    mask = mask[:, :longest]
    return _Inputs(part.tokens[:, :longest], mask, mask)


def _check_pairs(name: str, pairs: tuple[Pair, ...] | list[Pair], least: Pair, most: Pair) -> None:
    for pair in pairs:
        if not all(low <= each <= high for low, each, high in zip(least, pair, most, strict=True)):
            must = f"from {least} to {most}, the layers of model and teacher"
            raise ConfigError(describe(name, "Imitation", must, pair))
