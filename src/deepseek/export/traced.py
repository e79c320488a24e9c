"""A model as a pure function of tensors, which `torch.export` can follow: what the formats that
start from PyTorch's own graph are made of.

The modules are the model's; what their passes do by Python (placement, planning, writing to a
cache) is replaced by tensors of any batch, length and past.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder
from deepseek.models.angles import cosine_factor
from deepseek.models.config import DecoderConfig
from deepseek.models.encoder import EncoderLayer
from deepseek.models.positions import alibi_slopes, inverse_frequencies

UNSEEN = -1e9
"""Added to the score of what a token does not see. Finite, so that a row of padding alone has
numbers too."""


def why_not_traced(config: DecoderConfig) -> str | None:
    """Return why a decoder cannot be written as one graph of tensors, or None if it can."""
    if config.experts is not None:
        return "experts, whose tokens are counted while it runs"
    if config.pattern is not None:
        return "a pattern of blocks"
    if config.rope.scaling == "dynamic":
        return "the dynamic rope rule, whose angles change while it runs"
    return None


def past_shapes(config: DecoderConfig, rows: int, length: int) -> tuple[list[int], list[int]]:
    """Return the shapes of a decoder's keys and values, all layers', for a past of `length`
    tokens."""
    if config.latent is None:
        heads, dims = config.num_kv_heads, (config.head_dim, config.head_dim)
    else:
        latent, heads = config.latent, config.num_heads
        dims = latent.nope_dim + latent.rope_dim, latent.value_dim
    keys, values = ([config.num_layers, rows, heads, length, dim] for dim in dims)
    return keys, values


class TracedDecoder(nn.Module):
    """A decoder that appends tokens to keys and values which it is given.

    Args:
        model: float32; its planner and execution of attention play no part.

    Raises:
        ConfigError: a model that is no plain graph of tensors.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        config = model.config
        reason = why_not_traced(config)
        if reason is not None:
            must = "a graph of tensors from ids to logits"
            raise ConfigError(describe("model", "export", must, reason))
        self.model, self.config = model, config
        dim = config.head_dim if config.latent is None else config.latent.rope_dim
        frequencies = inverse_frequencies(config.rope, dim, config.max_positions)
        self.frequencies = nn.Buffer(frequencies.clone(), persistent=False)
        self.slopes = nn.Buffer(torch.tensor(alibi_slopes(config.num_heads)), persistent=False)

    def forward(
        self, ids: Tensor, mask: Tensor, past_mask: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, T, vocabulary], and keys and values of the tokens alone, to be put
        behind those of the past.

        Two masks, and not one of past + T: every length is one input's own then, and a graph
        follows none that is a sum.

        Args:
            ids: int64 [B, T].
            mask: int64 [B, T], 1 for a token and 0 for padding on either side.
            past_mask: int64 [B, past], likewise.
            keys, values: of all layers, [layers, B, heads, past, channels].
        """
        num_past, length = past_mask.shape[1], ids.shape[1]
        slots = torch.arange(num_past + length, device=ids.device)
        context = _Context(self, keys, values, torch.cat((past_mask, mask), 1), slots, num_past)
        stack = self.model.model
        states = stack.embed_tokens(ids)
        for layer in stack.layers:
            states = layer(states, context)
        logits = self.model.lm_head(stack.norm(states))
        return logits, torch.stack(context.keys), torch.stack(context.values)

    def rotations(self, positions: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the tables of `deepseek.ops.rope.rotate` for positions [T]; none with ALiBi."""
        if self.config.positions != "rope":
            return None, None
        angles = positions[:, None].float() * self.frequencies
        factor = cosine_factor(self.config.rope)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return tables[0][None, None], tables[1][None, None]


class _Context:
    """Stands where the layers expect a `PassContext`."""

    cache = None

    def __init__(
        self,
        owner: TracedDecoder,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        slots: Tensor,
        num_past: int,
    ) -> None:
        config, queries = owner.config, slots[num_past:]
        self.config, self.past = config, (keys, values)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.cos, self.sin = owner.rotations(queries)
        self.threshold = 0.0 if config.gates is None else config.gates.threshold
        self.distance = queries[:, None] - slots
        self.is_token = mask[:, None, None].bool()
        self.slopes = owner.slopes if config.positions == "alibi" else None
        self.bias: dict[int | None, Tensor] = {}

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        past_keys, past_values = self.past
        return torch.cat((past_keys[layer], keys), 2), torch.cat((past_values[layer], values), 2)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        kv: tuple[Tensor, Tensor],
        gates: Tensor | None,
        scale: float | None = None,
    ) -> Tensor:
        window = self.config.window if layer in self.config.window_layers else None
        if window not in self.bias:
            self.bias[window] = self._bias(window)
        keys, values = kv
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=self.bias[window],
            scale=scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return out if gates is None else out * gates.transpose(1, 2)[..., None]

    def _bias(self, window: int | None) -> Tensor:
        """Return what is added to the scores, [B, 1 or heads, T, slots]."""
        sees = self.distance >= 0
        if window is not None:
            sees = sees & (self.distance < window)
        bias = torch.where(sees & self.is_token, 0.0, UNSEEN)
        if self.slopes is None:
            return bias
        return bias - self.slopes[:, None, None] * self.distance


class TracedEncoder(nn.Module):
    """An encoder's states of each token, or the logits of its classifier where it has one.

    Args:
        model: float32.
    """

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return [B, T, hidden], or [B, labels] with a classifier.

        Args:
            ids: int64 [B, T].
            mask: int64 [B, T], 1 for a token and 0 for padding on either side.
        """
        model = self.model
        bias = torch.where(mask[:, None, None].bool(), 0.0, UNSEEN)
        states = model.embeddings(ids, None)
        for layer in model.encoder.layer:
            states = _encoder_layer(cast("EncoderLayer", layer), states, bias)
        if model.classifier is None or model.pooler is None:
            return states
        return model.classifier(torch.tanh(model.pooler["dense"](states[:, 0])))


def _encoder_layer(layer: EncoderLayer, states: Tensor, bias: Tensor) -> Tensor:
    attention: Any = layer.attention["self"]
    rows, length, _ = states.shape
    queries, keys, values = (
        part(states).view(rows, length, attention.num_heads, -1).transpose(1, 2)
        for part in (attention.query, attention.key, attention.value)
    )
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    attended = layer.attention["output"](out.transpose(1, 2).reshape(rows, length, -1), states)
    inner = layer.activation(layer.intermediate["dense"](attended))
    return layer.output(inner, attended)
