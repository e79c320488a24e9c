"""The parts of a decoder layer: norm, attention in its two forms, feed-forward, experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.models.config import DecoderConfig, ExpertsConfig, LatentConfig
from deepseek.models.context import PassContext
from deepseek.models.positions import latent_score_factor
from deepseek.ops.attention import KVShape
from deepseek.ops.experts import experts_swiglu
from deepseek.ops.linear import Linear, linear
from deepseek.ops.rope import deinterleave, rotate, rotate_both


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale: [..., dim] to [..., dim], computed in float32.

    Source: Zhang and Sennrich 2019.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Return the normed states; under autocast in its dtype, once for all products they
        enter."""
        normed = F.rms_norm(states, self.weight.shape, self.weight, self.eps)
        device = states.device.type
        if torch.is_autocast_enabled(device):
            return normed.to(torch.get_autocast_dtype(device))
        return normed


def head_gates(logits: Tensor) -> Tensor:
    """Return the gates of `GateConfig` from what a layer's `head_gate` gives, float32."""
    return 2 * logits.float().sigmoid()


class _Gated(nn.Module):
    """What the two forms of attention share: a gate for each head, where the config has them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_gate = None if config.gates is None else gate_layer(config)

    def gates(self, states: Tensor, context: PassContext) -> Tensor | None:
        """Return each head's gate of a layer's input [B, T, hidden], float32 [B, T, heads]; outside
        training zero where it is below the threshold."""
        if self.head_gate is None:
            return None
        gates = head_gates(self.head_gate(states))
        if self.training:
            return gates
        return gates.masked_fill(gates < context.threshold, 0.0)


class Attention(_Gated):
    """Grouped-query attention with rotary positions or ALiBi, a bias, a query/key norm, a window or
    gates where asked for."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config)
        self.layer = layer
        self.head_dim = config.head_dim
        hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        self.q_proj = Linear(hidden, heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(heads * config.head_dim, hidden, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    @staticmethod
    def kv_shape(config: DecoderConfig) -> KVShape:
        """Return what the layer stores for one token."""
        return KVShape(config.num_kv_heads, config.head_dim, config.head_dim)

    def forward(self, states: Tensor, context: PassContext) -> Tensor:
        """Return the attention output: [B, T, hidden] to [B, T, hidden]."""
        rows, length, _ = states.shape
        queries = self.q_proj(states).view(rows, length, -1, self.head_dim)
        keys = self.k_proj(states).view(rows, length, -1, self.head_dim)
        values = self.v_proj(states).view(rows, length, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        if context.cos is not None and context.sin is not None:
            queries, keys = rotate_both(queries, keys, context.cos, context.sin)
        kv = context.store(self.layer, keys, values)
        out = context.attend(self.layer, queries, kv, self.gates(states, context))
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))

    def keep(self, states: Tensor, context: PassContext) -> None:
        """Store the keys and values of states [B, T, hidden] as `forward` does, and attend to
        nothing."""
        rows, length, _ = states.shape
        keys = self.k_proj(states).view(rows, length, -1, self.head_dim)
        values = self.v_proj(states).view(rows, length, -1, self.head_dim).transpose(1, 2)
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        keys = keys.transpose(1, 2)
        if context.cos is not None and context.sin is not None:
            keys = rotate(keys, context.cos, context.sin)
        context.store(self.layer, keys, values)


class LatentAttention(_Gated):
    """Multi-head latent attention.

    Without a cache keys and values are expanded from the latent. With one, the latent and the
    rotated shared key are stored (one KV head for all query heads), and the expansion is absorbed
    into query and output, so that attention itself reads the latent: the same mathematics with far
    fewer bytes per token.

    Source: DeepSeek-V2 (2405.04434), section 2.1, equations 37-47; absorption as its section 2.1.2
    describes.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config)
        latent = _latent(config)
        self.layer, self.latent, self.num_heads = layer, latent, config.num_heads
        self.interleaved = config.rope.interleaved
        self.query_dim = query_dim = latent.nope_dim + latent.rope_dim
        self.scale = query_dim**-0.5 * latent_score_factor(config.rope)
        hidden, bias = config.hidden_size, config.qkv_bias
        if latent.query_rank is None:
            self.q_proj = Linear(hidden, config.num_heads * query_dim, bias=False)
        else:
            self.q_a_proj = Linear(hidden, latent.query_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(latent.query_rank, 1e-6)
            self.q_b_proj = Linear(latent.query_rank, config.num_heads * query_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, latent.kv_rank + latent.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(latent.kv_rank, 1e-6)
        expanded = config.num_heads * (latent.nope_dim + latent.value_dim)
        self.kv_b_proj = Linear(latent.kv_rank, expanded, bias=False)
        self.o_proj = Linear(config.num_heads * latent.value_dim, hidden, bias=config.output_bias)

    @staticmethod
    def kv_shape(config: DecoderConfig) -> KVShape:
        """Return what the layer stores for one token: latent and shared key, the values lying in
        them."""
        latent = _latent(config)
        return KVShape(1, latent.kv_rank + latent.rope_dim, latent.kv_rank, values_in_keys=True)

    def forward(self, states: Tensor, context: PassContext) -> Tensor:
        """Return the attention output: [B, T, hidden] to [B, T, hidden]."""
        latent = self.latent
        q_nope, q_rope = self._queries(states).split([latent.nope_dim, latent.rope_dim], dim=-1)
        content, k_rope = self._content(states)
        if self.interleaved:
            q_rope, k_rope = deinterleave(q_rope), deinterleave(k_rope)
        if context.cos is not None and context.sin is not None:
            q_rope, k_rope = rotate_both(q_rope, k_rope, context.cos, context.sin)
        attend = self._expanded if context.cache is None else self._absorbed
        out = attend(q_nope, q_rope, content, k_rope, context, self.gates(states, context))
        rows, length, _ = states.shape
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))

    def keep(self, states: Tensor, context: PassContext) -> None:
        """Store the latent and the shared key of states [B, T, hidden] as `forward` does with a
        cache, and attend to nothing."""
        content, k_rope = self._content(states)
        if self.interleaved:
            k_rope = deinterleave(k_rope)
        if context.cos is not None and context.sin is not None:
            k_rope = rotate(k_rope, context.cos, context.sin)
        context.store(self.layer, torch.cat((content, k_rope), dim=-1), None)

    def _content(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent [B, 1, T, rank] and the shared key, not yet rotated [B, 1, T, dim]."""
        dims = [self.latent.kv_rank, self.latent.rope_dim]
        content, k_rope = self.kv_a_proj_with_mqa(states).split(dims, dim=-1)
        return self.kv_a_layernorm(content)[:, None], k_rope[:, None]

    def _queries(self, states: Tensor) -> Tensor:
        if self.latent.query_rank is None:
            queries = self.q_proj(states)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(states)))
        rows, length, _ = states.shape
        return queries.view(rows, length, -1, self.query_dim).transpose(1, 2)

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        content: Tensor,
        k_rope: Tensor,
        context: PassContext,
        gates: Tensor | None,
    ) -> Tensor:
        latent = self.latent
        rows, length = content.shape[0], content.shape[2]
        dims = [latent.nope_dim, latent.value_dim]
        expanded = self.kv_b_proj(content[:, 0]).view(rows, length, -1, sum(dims)).transpose(1, 2)
        k_nope, values = expanded.split(dims, dim=-1)
        keys = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        queries = torch.cat((q_nope, q_rope), dim=-1)
        kv = context.store(self.layer, keys, values)
        return context.attend(self.layer, queries, kv, gates, self.scale)

    def _absorbed(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        content: Tensor,
        k_rope: Tensor,
        context: PassContext,
        gates: Tensor | None,
    ) -> Tensor:
        latent = self.latent
        weight = self.kv_b_proj.weight.view(self.num_heads, -1, latent.kv_rank)
        key_weight, value_weight = weight.split([latent.nope_dim, latent.value_dim], dim=1)
        queries = torch.cat((q_nope @ key_weight, q_rope), dim=-1)
        kv = context.store(self.layer, torch.cat((content, k_rope), dim=-1), None)
        out = context.attend(self.layer, queries, kv, gates, self.scale)
        return out @ value_weight.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU feed-forward: [..., hidden] to [..., hidden]. Source: Shazeer 2020."""

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj = Linear(width, hidden, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class Router(nn.Module):
    """Chooses experts for each token. Source: as `ExpertsConfig`."""

    def __init__(self, hidden: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden))
        if config.score == "sigmoid":
            self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return chosen experts int64 [N, k] and their weights [N, k] in the dtype of the states
        [N, hidden]."""
        config = self.config
        if config.score == "sigmoid":
            scores = linear(states.float(), self.weight.float()).sigmoid()
            chosen = self._in_best_groups(scores + self.e_score_correction_bias)
        else:
            scores = linear(states, self.weight).softmax(dim=-1, dtype=torch.float32)
            chosen = scores.topk(config.num_active, dim=-1).indices
        weights = scores.gather(1, chosen)
        if config.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, (weights * config.scale).to(states.dtype)

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        config = self.config
        if config.num_groups > 1:
            grouped = scores.view(scores.shape[0], config.num_groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.num_active_groups, dim=-1)
            open_groups = torch.zeros_like(grouped[..., 0], dtype=torch.bool)
            open_groups.scatter_(1, best.indices, True)
            scores = grouped.masked_fill(~open_groups[..., None], float("-inf")).flatten(1)
        return scores.topk(config.num_active, dim=-1).indices


class ExpertWeights(nn.Module):
    """The weights of all routed experts of a layer, stacked."""

    def __init__(self, hidden: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.width, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, config.width))

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts [N, k] of each token: [N, hidden] to
        [N, hidden]."""
        return experts_swiglu(tokens, self.gate_up_proj, self.down_proj, chosen, weights)


class Experts(nn.Module):
    """Mixture of experts: routed experts, plus shared ones where the config has them."""

    def __init__(self, hidden: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.gate = Router(hidden, config)
        self.experts = ExpertWeights(hidden, config)
        shared = config.num_shared * config.width
        self.shared_experts = FeedForward(hidden, shared) if shared else None

    def forward(self, states: Tensor) -> Tensor:
        """Return the mixed feed-forward: [..., hidden] to [..., hidden]."""
        tokens = states.reshape(-1, states.shape[-1])
        out = self.experts(tokens, *self.gate(tokens)).view_as(states)
        return out if self.shared_experts is None else out + self.shared_experts(states)


def gate_layer(config: DecoderConfig) -> Linear:
    """Return the layer that gives the gates' logits, with weights of zero: every gate is 1."""
    with torch.random.fork_rng(devices=()):  # the other weights are drawn as without gates
        made = Linear(config.hidden_size, config.num_heads)
    if not made.weight.is_meta:
        nn.init.zeros_(made.weight)
        nn.init.zeros_(made.bias)
    return made


def embedding(count: int, dim: int) -> nn.Embedding:
    """Return an embedding [count, dim] whose weight is not drawn yet.

    Drawing it on `meta`, as `nn.Embedding` does by itself, imports PyTorch's compiler: a second or
    two of every load.
    """
    return nn.Embedding(count, dim, _weight=torch.empty(count, dim))


def _latent(config: DecoderConfig) -> LatentConfig:
    if config.latent is None:
        raise TypeError("LatentAttention needs a config with `latent`")
    return config.latent
