"""The decoder: one module for every decoder-only family this package runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.models.config import DecoderConfig
from deepseek.models.context import PassContext
from deepseek.models.layers import (
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    RMSNorm,
    embedding,
)
from deepseek.models.planner import Planner, WindowPlanner
from deepseek.models.positions import alibi_slopes, rope_tables
from deepseek.models.static import StaticPlanner
from deepseek.ops.attention import AttentionImpl, KVCache, Layout
from deepseek.ops.cross_entropy import IGNORED, linear_cross_entropy
from deepseek.ops.grid import GridSource
from deepseek.ops.linear import Linear
from deepseek.ops.scheme import KVStorage

if TYPE_CHECKING:
    from deepseek.data import Tokenizer


class CausalOutput(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor | None
    """Mean cross-entropy of the labels in nats, float32; None without labels."""
    logits: Tensor
    """[B, T, vocab]; [B, 1, vocab] with `last_only`."""
    hidden_states: tuple[Tensor, ...] | None
    """Embedding output, then each layer's, the last one normed: layers + 1 tensors [B, T,
    hidden]."""


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        kind = Attention if config.latent is None else LatentAttention
        self.self_attn = kind(config, layer)
        if config.experts is not None and config.has_experts(layer):
            self.mlp: nn.Module = Experts(config.hidden_size, config.experts)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, states: Tensor, context: PassContext) -> Tensor:
        """Return the layer's output: [B, T, hidden] to [B, T, hidden]."""
        states = states + self.self_attn(self.input_layernorm(states), context)
        return states + self.mlp(self.post_attention_layernorm(states))

    def keep(self, states: Tensor, context: PassContext) -> None:
        """Store the keys and values of states [B, T, hidden] that go no further."""
        self.self_attn.keep(self.input_layernorm(states), context)


class DecoderStack(nn.Module):
    """Embedding, layers and final norm: what Hugging Face folders call `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A decoder-only language model, built from its config and named as its Hugging Face family
    names its weights.

    `tokenizer`, `bundle`, `grids` (weights that its folder holds on a grid of integers, by name)
    and `kv` (how keys and values are to be cached, where its card says so) are set by whoever loads
    it; they stay empty on a model made in memory.

    Args:
        config: what it is made of.
        planner: what decides which blocks attention sees; None for the config's own windows or
            pattern, dense elsewhere.
        impl: execution of attention, see `deepseek.ops.attention.attention`.
    """

    def __init__(
        self, config: DecoderConfig, *, planner: Planner | None = None, impl: AttentionImpl = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._initialize()
        if planner is None and config.window is not None:
            planner = WindowPlanner(config.window, config.window_layers)
        if planner is None and config.pattern is not None:
            planner = StaticPlanner(config.pattern)
        self.planner = planner
        self.impl: AttentionImpl = impl
        self.tokenizer: Tokenizer | None = None
        self.bundle: object | None = None
        self.grids: Mapping[str, GridSource] = {}
        self.kv: KVStorage | None = None
        # PEFT passes it from model to model and asks nothing of it.
        self.generation_config: object | None = None

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.is_meta or name.endswith(("norm.weight", "layernorm.weight")):
                continue
            if name.endswith(("bias", "head_gate.weight")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.init_std)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.embed_tokens.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of the tokens (PEFT and transformers ask by this name)."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head (PEFT and transformers ask by this name)."""
        return self.lm_head

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Return the arguments of a pass over a whole sequence (PEFT asks for this name)."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """Return an empty cache for `batch_size` rows of at most `max_tokens` tokens, to hand to
        `forward`."""
        kind = Attention if self.config.latent is None else LatentAttention
        shapes = [kind.kv_shape(self.config)] * self.config.num_layers
        return KVCache.contiguous(
            shapes, batch_size, max_tokens, dtype=self.dtype, device=self.device
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        output_hidden_states: bool | None = False,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalOutput:
        """Return logits, and what else was asked for.

        Args:
            input_ids: int64 [B, T]; or give `inputs_embeds` [B, T, hidden].
            attention_mask: [B, T], 1 for a token, 0 for padding on either side. With a cache
                padding must be on the right: row b then appends its first `attention_mask[b].sum()`
                tokens.
            position_ids: int64 [B or 1, T]; None for the slot numbers (0 … T-1 without a cache).
            labels: int64 [B, T], the tokens themselves (the shift is made here), -100 where none
                counts.
            cache: keys and values of earlier tokens; appended to.
            last_only: compute logits of each row's last token only.
            output_hidden_states: also return every layer's output.
            output_attentions: must not be True: attention weights are never formed.
            return_dict: accepted and ignored; the output is read by name and by place.

        Raises:
            ShapeError: inputs that do not fit together.
            CapacityError: the cache is full.
            ConfigError: attention weights were asked for.
        """
        if output_attentions:
            must = "False, attention weights are never formed"
            raise ConfigError(describe("output_attentions", "Decoder", must, output_attentions))
        if (input_ids is None) == (inputs_embeds is None):
            must = "given, and not both"
            got = "both" if input_ids is not None else "neither"
            raise ShapeError(describe("input_ids or inputs_embeds", "Decoder", must, got))
        states = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        _check_labels(labels, states, last_only)
        states, hidden, counts = self._through_layers(
            states, input_ids, attention_mask, position_ids, cache, keeps=bool(output_hidden_states)
        )
        if last_only:
            states = _last(states, attention_mask, counts)
        logits = self.lm_head(states)
        loss = None if labels is None else next_token_loss(logits, labels)
        return CausalOutput(loss, logits, hidden)

    def loss(
        self, input_ids: Tensor, labels: Tensor, exit_weights: Mapping[int, float] | None = None
    ) -> Tensor:
        """Return the loss of `forward` without its logits, which are most of the memory of a
        training step; it can be differentiated once.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], as in `forward`.
            exit_weights: return the sum of the losses behind so many layers, by the same norm and
                head, times these weights; None for the loss behind all of them.

        Raises:
            ShapeError: they do not fit together.
        """
        embedded = self._embed(input_ids)
        _check_labels(labels, embedded, False)
        keeps = exit_weights is not None
        states, hidden, _ = self._through_layers(embedded, input_ids, None, None, None, keeps=keeps)
        if exit_weights is None or hidden is None:
            return self._loss(states, labels)
        normed = [*map(self.model.norm, hidden[:-1]), states]
        return torch.stack(
            [weight * self._loss(normed[layer], labels) for layer, weight in exit_weights.items()]
        ).sum()

    def final_states(
        self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Return what the head reads: the last layer's output, normed, [B, T, hidden].

        Args:
            input_ids: int64 [B, T], all of them tokens; or give
            inputs_embeds: [B, T, hidden].
        """
        states = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self._states_of(states, input_ids)

    def every_state(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the embedding output, then each layer's, the last one normed: layers + 1 tensors
        [B, T, hidden].

        Args:
            input_ids: int64 [B, T], all of them tokens.
        """
        states = self._embed(input_ids)
        _, kept, _ = self._through_layers(states, input_ids, None, None, None, keeps=True)
        assert kept is not None
        return kept

    def _states_of(self, states: Tensor, input_ids: Tensor | None) -> Tensor:
        return self._through_layers(states, input_ids, None, None, None, keeps=False)[0]

    def begin_pass(self, input_ids: Tensor, cache: KVCache) -> tuple[Tensor, PassContext]:
        """Return the embedded tokens [B, T, hidden], and what the layers of a pass that appends
        them share; for a pass other than `forward`. `cache.advance(context.layout)` ends it.

        Args:
            input_ids: int64 [B, T], all of them tokens.
            cache: of as many rows.

        Raises:
            ShapeError: inputs that do not fit together.
            CapacityError: the cache is full.
        """
        states = self._embed(input_ids)
        layout, _ = self._place(states, input_ids, None, cache)
        return states, self._context(states, layout, None, cache)

    def _through_layers(
        self,
        states: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        *,
        keeps: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, list[int] | None]:
        """Return the last layer's output normed, every layer's if wanted, and the tokens of each
        row where a cache made them be counted."""
        layout, counts = self._place(states, input_ids, attention_mask, cache)
        context = self._context(states, layout, position_ids, cache)
        kept = [states] if keeps else None
        for layer in self.model.layers:
            states = layer(states, context)
            if kept is not None:
                kept.append(states)
        states = self.model.norm(states)
        if kept is not None:
            kept[-1] = states
        if cache is not None:
            cache.advance(layout)
        return states, None if kept is None else tuple(kept), counts

    def _loss(self, states: Tensor, labels: Tensor) -> Tensor:
        if type(self.lm_head) is not Linear:  # a low-rank head, say
            return next_token_loss(self.lm_head(states), labels)
        targets = labels[:, 1:].flatten()
        total = linear_cross_entropy(states[:, :-1].flatten(0, 1), self.lm_head.weight, targets)
        return total / (targets != IGNORED).sum()

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
            got = None if input_ids is None else list(input_ids.shape)
            raise ShapeError(describe("input_ids", "Decoder", "[rows, tokens], at least one", got))
        return self.model.embed_tokens(input_ids)

    def _place(
        self,
        states: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Layout, list[int] | None]:
        rows, length, _ = states.shape
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (rows, length):
                must = f"of shape {[rows, length]}, like input_ids"
                raise ShapeError(
                    describe("attention_mask", "Decoder", must, list(attention_mask.shape))
                )
            attention_mask = attention_mask.bool()
        if cache is None:
            all_tokens = attention_mask is None or bool(attention_mask.all())
            mask = None if all_tokens else attention_mask
            return Layout.dense(rows, length, mask, tokens=input_ids), None
        counts = None
        if attention_mask is not None:
            counts = attention_mask.sum(dim=1).tolist()
            ends = torch.arange(length, device=states.device) < attention_mask.sum(1, keepdim=True)
            if not torch.equal(ends, attention_mask):
                must = "padded on the right when there is a cache"
                raise ShapeError(describe("attention_mask", "Decoder", must, "padding elsewhere"))
        return cache.place(length, counts, input_ids), counts

    def _context(
        self, states: Tensor, layout: Layout, position_ids: Tensor | None, cache: KVCache | None
    ) -> PassContext:
        config, cos, sin, slopes = self.config, None, None, None
        if position_ids is not None:
            self._check_positions(position_ids, states)
        if config.positions == "rope":
            if position_ids is None:
                position_ids = layout.query_slots(states.device)
                position_ids = position_ids[:1] if layout.is_uniform else position_ids
            dim = config.head_dim if config.latent is None else config.latent.rope_dim
            cos, sin = rope_tables(
                config.rope, dim, config.max_positions, position_ids, states.dtype
            )
        else:
            slopes = torch.tensor(alibi_slopes(config.num_heads), device=states.device)
        threshold = 0.0 if config.gates is None else config.gates.threshold
        return PassContext(layout, cos, sin, slopes, cache, self.planner, self.impl, threshold)

    def _check_positions(self, position_ids: Tensor, states: Tensor) -> None:
        rows, length, _ = states.shape
        if self.config.positions != "rope":
            must = "None with ALiBi, which counts slots"
            raise ShapeError(describe("position_ids", "Decoder", must, list(position_ids.shape)))
        if tuple(position_ids.shape) not in ((rows, length), (1, length)):
            must = f"of shape {[rows, length]} or {[1, length]}"
            raise ShapeError(describe("position_ids", "Decoder", must, list(position_ids.shape)))


def _check_labels(labels: Tensor | None, states: Tensor, last_only: bool) -> None:
    if labels is None:
        return
    rows, length, _ = states.shape
    if last_only or tuple(labels.shape) != (rows, length) or length < 2:
        must = f"of shape {[rows, length]} with at least two tokens, and without last_only"
        raise ShapeError(describe("labels", "Decoder", must, list(labels.shape)))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of each label given the tokens before it, float32
    scalar.

    Args:
        logits: [B, T, vocab].
        labels: int64 [B, T], -100 where none counts.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _last(states: Tensor, attention_mask: Tensor | None, counts: list[int] | None) -> Tensor:
    if attention_mask is None:
        return states[:, -1:]
    if counts is not None and min(counts) < 1:
        must = "at least one token in every row when last_only is asked for"
        raise ShapeError(describe("attention_mask", "Decoder", must, counts))
    places = torch.arange(states.shape[1], device=states.device)
    last = (attention_mask.bool() * places).argmax(dim=1)
    return states[torch.arange(states.shape[0], device=states.device), last][:, None]
