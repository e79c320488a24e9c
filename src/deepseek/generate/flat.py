"""The step of decoding as a flat program: the same mathematics as the decoder, without its modules.

A step multiplies one row by every weight, which takes little more than reading the weights; walking
through the modules and their many small operations takes as long again. So the step is written out
once per layer with the fewest operations: query, key and value in one product, the cache written
and read in place.

It is made from an ordinary decoder and reads that decoder's own weights. To make one product of
three, their weights are moved into one piece of memory, once; they stay the same parameters, each a
view of its part, so training, saving and moving the model go on as before. (Gate and up stay two
products: joining them gained 3 % and copied two fifths of the weights out of the mapped file.)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.models import Decoder, WindowPlanner
from deepseek.models.decoder import DecoderLayer, DecoderStack
from deepseek.models.layers import Attention, FeedForward, RMSNorm
from deepseek.models.positions import rope_tables
from deepseek.ops.attention import KVCache
from deepseek.ops.linear import Linear, choose, linear
from deepseek.ops.rope import rotate

_LOG = logging.getLogger(__name__)
_KNOWN = frozenset(
    {
        Attention,
        Decoder,
        DecoderLayer,
        DecoderStack,
        FeedForward,
        Linear,
        RMSNorm,
        nn.Embedding,
        nn.ModuleList,
    }
)
"""The very classes whose mathematics the step writes out; a subclass may compute something else."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """The weights of a layer as the step reads them."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    window: int | None


class FlatStep:
    """One step of decoding for every row of a cache. Make it by `flat_step`."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self._config = model.config
        self._embedding = model.model.embed_tokens.weight
        self._head = model.lm_head.weight
        self._norm = _doubled(model.model.norm)
        self._layers = [_read_layer(model, index) for index in range(model.config.num_layers)]
        self._cache = cache
        self._pages = [layer.in_rows() for layer in cache.layers]
        self._rows = torch.arange(cache.num_rows, device=model.device)
        chosen = choose(model.device, model.dtype, cache.num_rows)
        self._linear = F.linear if chosen == "native" else linear

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; return the logits [rows, vocab] of the next.

        Args:
            tokens: int64 [rows].

        Raises:
            CapacityError: a row of the cache is full.
        """
        layout = self._cache.place(1)
        positions = layout.query_slots(tokens.device)
        cos, sin = self._angles(positions)
        mask = None if layout.is_uniform else layout.visible(tokens.device)[:, None]
        states = F.embedding(tokens, self._embedding)
        for layer, pages in zip(self._layers, self._pages, strict=True):
            states = self._layer(states, layer, pages, positions[:, 0], cos, sin, mask)
        self._cache.advance(layout)
        return self._linear(self._normed(states, self._norm), self._head)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        config = self._config
        dtype = self._embedding.dtype
        cos, sin = rope_tables(config.rope, config.head_dim, config.max_positions, positions, dtype)
        return cos[:, 0], sin[:, 0]

    def _layer(
        self,
        states: Tensor,
        layer: _Layer,
        pages: tuple[Tensor, Tensor],
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        config, linear = self._config, self._linear
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = states.shape[0]
        normed = self._normed(states, layer.input_norm)
        qkv = linear(normed, layer.qkv, layer.qkv_bias).view(rows, -1, dim)
        rotated = rotate(self._head_normed(qkv, layer), cos, sin)
        keys, values = pages
        length = max(self._cache.lengths) + 1
        if mask is None:
            keys[:, length - 1].copy_(rotated[:, heads:])
            values[:, length - 1].copy_(qkv[:, heads + kv_heads :])
        else:
            keys[self._rows, slots] = rotated[:, heads:]
            values[self._rows, slots] = qkv[:, heads + kv_heads :]
        mask = _windowed(mask, slots, layer.window, length)
        start = 0
        if mask is None and layer.window is not None:
            start = max(0, length - layer.window)
        attended = F.scaled_dot_product_attention(
            rotated[:, :heads].view(rows, kv_heads, heads // kv_heads, dim),
            keys[:, start:length].transpose(1, 2),
            values[:, start:length].transpose(1, 2),
            attn_mask=mask,
        )
        flat = attended.reshape(rows, -1)
        states = states.add_(linear(flat, layer.output, layer.output_bias))
        normed = self._normed(states, layer.mlp_norm)
        gate = linear(normed, layer.gate, layer.gate_bias)
        hidden = F.silu(gate, inplace=True).mul_(linear(normed, layer.up, layer.up_bias))
        return states.add_(linear(hidden, layer.down, layer.down_bias))

    def _head_normed(self, qkv: Tensor, layer: _Layer) -> Tensor:
        """Return queries and keys [rows, heads + KV heads, dim], normed where the model does it."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        if layer.query_norm is None or layer.key_norm is None:
            return qkv[:, : heads + kv_heads]
        queries = self._normed(qkv[:, :heads], layer.query_norm)
        return torch.cat((queries, self._normed(qkv[:, heads:][:, :kv_heads], layer.key_norm)), 1)

    def _normed(self, states: Tensor, doubled: Tensor) -> Tensor:
        """Return the RMS norm of each row.

        It is the layer norm of the row followed by its negative, whose mean is zero: one fused
        operation, where PyTorch composes an RMS norm of eight on the CPU.
        """
        both = torch.cat((states, -states), dim=-1)
        normed = F.layer_norm(both, doubled.shape, doubled, None, self._config.norm_eps)
        return normed[..., : states.shape[-1]]


def flat_step(model: Decoder, cache: KVCache) -> FlatStep | None:
    """Return the flat step of a decoder over a cache; None where `why_not_flat` gives a reason."""
    reason = why_not_flat(model, cache)
    if reason is not None:
        _LOG.info("decoding runs through the modules: %s", reason)
        return None
    return FlatStep(model, cache)


def why_not_flat(model: nn.Module, cache: KVCache) -> str | None:
    """Return why a model's step runs through its modules, or None if it can run flat."""
    if type(model) is not Decoder:
        return f"{type(model).__name__} is not a plain Decoder"
    config = model.config
    if config.latent is not None or config.experts is not None or config.positions != "rope":
        return "latent attention, experts and ALiBi have no flat step"
    if model.planner is not None and type(model.planner) is not WindowPlanner:
        return f"the planner {type(model.planner).__name__} may read queries and keys"
    if model.impl != "auto":
        return f"the execution {model.impl!r} of attention was asked for by name"
    if any(layer.first_page is None for layer in cache.layers):
        return "the pages of the cache do not follow one another"
    for name, module in model.named_modules():
        if type(module) not in _KNOWN:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has forward hooks"
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        return "the weights have several dtypes"
    return None


def _read_layer(model: Decoder, index: int) -> _Layer:
    layer = model.model.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, FeedForward)
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    planner = model.planner
    slides = isinstance(planner, WindowPlanner) and index in planner.layers
    query_norm, key_norm = attention.q_norm, attention.k_norm
    return _Layer(
        input_norm=_doubled(layer.input_layernorm),
        qkv=_joined([each.weight for each in qkv]),
        qkv_bias=_joined_bias(qkv),
        query_norm=None if query_norm is None else _doubled(query_norm),
        key_norm=None if key_norm is None else _doubled(key_norm),
        output=attention.o_proj.weight,
        output_bias=attention.o_proj.bias,
        mlp_norm=_doubled(layer.post_attention_layernorm),
        gate=mlp.gate_proj.weight,
        gate_bias=mlp.gate_proj.bias,
        up=mlp.up_proj.weight,
        up_bias=mlp.up_proj.bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
        window=planner.window if slides and isinstance(planner, WindowPlanner) else None,
    )


def _doubled(norm: nn.Module | Tensor) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return torch.cat((norm.weight, norm.weight))


def _joined_bias(layers: list[Linear]) -> Tensor | None:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return _joined(biases) if biases else None


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """Return parameters that lie one behind the other as one tensor; move them there if need be."""
    first, rows = parameters[0].data, sum(each.shape[0] for each in parameters)
    size = (rows, *first.shape[1:])
    if _is_one_piece(parameters):
        return first.as_strided(size, first.stride(), first.storage_offset())
    # a tensor made in inference mode could not be trained afterwards
    with torch.inference_mode(False):
        joined = torch.cat([each.data for each in parameters])
    start = 0
    for each in parameters:
        each.data = joined[start : start + each.shape[0]]
        start += each.shape[0]
    return joined


def _is_one_piece(parameters: Sequence[Tensor]) -> bool:
    storage, end = parameters[0].untyped_storage().data_ptr(), parameters[0].data_ptr()
    for each in parameters:
        if each.untyped_storage().data_ptr() != storage or each.data_ptr() != end:
            return False
        if not each.is_contiguous():
            return False
        end += each.nbytes
    return True


def _windowed(mask: Tensor | None, slots: Tensor, window: int | None, length: int) -> Tensor | None:
    """Return a ragged batch's mask narrowed to each row's window."""
    if mask is None or window is None:
        return mask
    places = torch.arange(length, device=slots.device)
    return mask & (places > slots[:, None] - window)[:, None, None]
