"""Attention relations of a layer held against those of a teacher's: head counts may differ."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder
from deepseek.models.layers import Attention

_MOST_HEADS = 16


def projections(model: Decoder | Encoder, layer: int) -> tuple[nn.Linear, ...]:
    """Return what gives the queries, keys and values of a layer, counted from 1.

    Raises:
        ConfigError: the layer has none, as that of latent attention.
    """
    if isinstance(model, Encoder):
        own = model.encoder.layer[layer - 1].get_submodule("attention.self")
        return tuple(own.get_submodule(name) for name in ("query", "key", "value"))  # type: ignore[return-value]
    attention = model.model.layers[layer - 1].get_submodule("self_attn")
    if not isinstance(attention, Attention):
        must, got = "one with queries, keys and values", type(attention).__name__
        raise ConfigError(describe("attention", "relations", must, got))
    return attention.q_proj, attention.k_proj, attention.v_proj


def num_relation_heads(
    model: Decoder | Encoder, teacher: Decoder | Encoder, layers: tuple[int, int], asked: int | None
) -> int:
    """Return into how many heads both models' queries, keys and values are cut.

    Args:
        model, teacher: the two.
        layers: of each, counted from 1.
        asked: a number, or None for the most that divide all widths, up to 16.

    Raises:
        ConfigError: the number does not divide them.
    """
    both = (*projections(model, layers[0]), *projections(teacher, layers[1]))
    common = math.gcd(*(each.out_features for each in both))
    if asked is None:
        return max(each for each in range(1, _MOST_HEADS + 1) if common % each == 0)
    if asked < 1 or common % asked:
        must = f"a divisor of {common}, which all queries, keys and values can be divided by"
        raise ConfigError(describe("relation_heads", "Imitation", must, asked))
    return asked


@contextlib.contextmanager
def watched(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Give a list that holds what each layer returned in its newest pass, in this order, once one
    has gone through them."""
    found: list[Tensor] = [torch.empty(0)] * len(layers)

    def note(place: int, layer: nn.Module, inputs: object, output: Tensor) -> None:
        found[place] = output

    hooks = [
        layer.register_forward_hook(functools.partial(note, place))
        for place, layer in enumerate(layers)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def relation_divergence(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    counts: Tensor,
    *,
    num_heads: int,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Return the sum, over the counted tokens and over relations of queries, keys and values with
    themselves, of KL(teacher || model) in nats, a mean over heads, float32 scalar.

    Source: Wang et al., "MiniLMv2" (2012.15828), section 3, all three relations alike.
    Deviation: in a decoder a token's relations are those with itself and the tokens before it, and
    queries and keys are taken before their rotation.

    Args:
        ours: queries, keys and values of the model [B, T, width] each, widths may differ.
        theirs: of the teacher, widths may differ from all of these.
        counts: bool [B, T].
        num_heads: into which each is cut; divides all widths.
        mask: bool [B, T] of tokens that are there; None for all.
        is_causal: whether a token sees none behind it.
    """
    rows, length = counts.shape
    visible = torch.ones(rows, 1, length, length, dtype=torch.bool, device=counts.device)
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    if is_causal:
        visible = visible.tril()
    total = ours[0].new_zeros((), dtype=torch.float32)
    for own, taught in zip(ours, theirs, strict=True):
        logs = _log_relation(own, num_heads, visible)
        targets = _log_relation(taught, num_heads, visible)
        each = (targets.exp() * (targets - logs)).sum(-1).mean(1)
        total = total + each[counts].sum()
    return total


def _log_relation(vectors: Tensor, num_heads: int, visible: Tensor) -> Tensor:
    """Return the logarithms of the softmax of a head's products with itself [B, heads, T, T]."""
    heads = vectors.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
    return scores.masked_fill(~visible, torch.finfo(torch.float32).min).log_softmax(-1)
