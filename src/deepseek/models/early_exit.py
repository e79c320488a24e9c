"""A pass in which tokens leave early, and the cache stays whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.models.decoder import Decoder, DecoderLayer
from deepseek.models.exits import Exits
from deepseek.models.planner import WindowPlanner
from deepseek.models.static import StaticPlanner
from deepseek.ops.attention import KVCache

_ROWS_PER_SLICE = 256
"""Rows of logits in float32 at a time."""


class ExitOutput(NamedTuple):
    """What a pass with exits gives."""

    logits: Tensor
    """[B, T, vocab], of the states with which each token left."""
    depths: Tensor
    """int64 [B, T]: layers that each token went through."""


def check_exits(model: Decoder, exits: Exits) -> None:
    """Raise if a model cannot have exits.

    Raises:
        ConfigError: a place is not below the model's layers, or its planner reads queries, which
            tokens that have left do not have.
    """
    exits.check(model.config.num_layers)
    if model.planner is not None and type(model.planner) not in (WindowPlanner, StaticPlanner):
        must = "one that goes by place alone"
        got = type(model.planner).__name__
        raise ConfigError(describe("planner", "a model with exits", must, got))


def forward_with_exits(
    model: Decoder, input_ids: Tensor, cache: KVCache, exits: Exits
) -> ExitOutput:
    """Append tokens to a cache and let each leave where it may.

    A token that has left keeps its states: in every layer above, its key and value are made of
    them. So a later token that goes deeper finds a key of each token before it, and several tokens
    in one pass give what they give one by one. Whether a token leaves depends on itself and what is
    before it in its row alone. A layer in which no token of the pass is left computes keys and
    values and nothing else; in one that some are left in, all of the pass are computed.

    Args:
        model: the decoder.
        input_ids: int64 [B, T], all of them tokens.
        cache: what is before them, read by all layers or with exits; appended to.
        exits: where tokens may leave.

    Raises:
        ConfigError: as `check_exits`.
        CapacityError: the cache is full.
        ShapeError: inputs that do not fit together.
    """
    check_exits(model, exits)
    states, context = model.begin_pass(input_ids, cache)
    inside = torch.ones(input_ids.shape, dtype=torch.bool, device=states.device)
    depths = torch.full_like(input_ids, model.config.num_layers)
    head = _Head(model, inside)
    for number, layer in enumerate(model.model.layers, start=1):
        assert isinstance(layer, DecoderLayer)
        if not bool(inside.any()):
            layer.keep(states, context)
            continue
        before = states
        states = torch.where(inside[..., None], layer(before, context), before)
        if number in exits.layers:
            if exits.criterion == "margin":
                leaving = head.ask(states, inside, exits.threshold)
            else:
                alike = F.cosine_similarity(before.float(), states.float(), dim=-1)
                leaving = inside & (alike.clamp(max=1) > exits.threshold)
            depths[leaving] = number
            inside = inside & ~leaving
    cache.advance(context.layout)
    return ExitOutput(head.finish(states), depths)


class _Head:
    """The logits of tokens that leave at different layers; each is computed once."""

    def __init__(self, model: Decoder, inside: Tensor) -> None:
        self._model = model
        self._logits: Tensor | None = None
        self._waiting = inside
        """bool [B, T]: whose logits are not there yet."""

    def ask(self, states: Tensor, inside: Tensor, threshold: float) -> Tensor:
        """Return which tokens [B, T] of those inside have a margin above the threshold."""
        leaving = torch.zeros_like(inside)
        places = inside.nonzero()
        for part in places.split(_ROWS_PER_SLICE):
            logits = self._head_on(states[part[:, 0], part[:, 1]][:, None])[:, 0]
            best = logits.float().softmax(dim=-1).topk(2, dim=-1).values
            sure = best[:, 0] - best[:, 1] > threshold
            rows, columns = part[sure].unbind(1)
            leaving[rows, columns] = True
            self._keep(rows, columns, logits[sure])
        return leaving

    def finish(self, states: Tensor) -> Tensor:
        """Return the logits of all tokens, given the states with which they left."""
        if self._logits is None:
            return self._head_on(states)
        rows, columns = self._waiting.nonzero().unbind(1)
        if len(rows):
            self._keep(rows, columns, self._head_on(states[rows, columns][:, None])[:, 0])
        return self._logits

    def _head_on(self, states: Tensor) -> Tensor:
        return self._model.lm_head(self._model.model.norm(states))

    def _keep(self, rows: Tensor, columns: Tensor, logits: Tensor) -> None:
        if not len(rows):
            return
        if self._logits is None:
            self._logits = logits.new_empty(*self._waiting.shape, logits.shape[-1])
        self._logits[rows, columns] = logits
        self._waiting = self._waiting.clone()
        self._waiting[rows, columns] = False
