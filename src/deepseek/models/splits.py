"""How a decoder is divided over processes: its split table, and what its config allows."""

from __future__ import annotations

from deepseek.errors import ConfigError, describe
from deepseek.models.config import DecoderConfig
from deepseek.parallel import Mesh, Rule

_LAYER = "model.layers.*"
_ENDS = (
    Rule("model.embed_tokens", "vocab"),
    Rule("lm_head", "vocab"),
)
_ATTENTION = (
    Rule(f"{_LAYER}.self_attn", "entry"),
    Rule(f"{_LAYER}.self_attn.[qkv]_proj", "column"),
    Rule(f"{_LAYER}.self_attn.[qk]_norm", "heads"),
    Rule(f"{_LAYER}.self_attn.head_gate", "column"),
    Rule(f"{_LAYER}.self_attn.o_proj", "row"),
)
# The latent is whole, and from it and the key that all heads share every process makes its heads.
_LATENT_ATTENTION = (
    Rule(f"{_LAYER}.self_attn.q_proj", "column"),
    Rule(f"{_LAYER}.self_attn.q_a_proj", "whole"),
    Rule(f"{_LAYER}.self_attn.q_b_proj", "column"),
    Rule(f"{_LAYER}.self_attn.kv_a_proj_with_mqa", "forked"),
    Rule(f"{_LAYER}.self_attn.kv_a_layernorm", "heads"),
    Rule(f"{_LAYER}.self_attn.kv_b_proj", "behind a fork"),
    Rule(f"{_LAYER}.self_attn.head_gate", "column"),
    Rule(f"{_LAYER}.self_attn.o_proj", "row"),
)
_FEED_FORWARD = (
    Rule(f"{_LAYER}.gate_proj", "column"),
    Rule(f"{_LAYER}.up_proj", "column"),
    Rule(f"{_LAYER}.down_proj", "row"),
)
_EXPERTS = (
    Rule(f"{_LAYER}.mlp.gate", "whole"),
    Rule(f"{_LAYER}.mlp.experts", "experts"),
    Rule(f"{_LAYER}.mlp.shared_experts", "entry"),
)
_NORMS = (Rule("*norm", "whole"),)


def decoder_splits(config: DecoderConfig) -> tuple[Rule, ...]:
    """Return the split table of a decoder; every decoder family has these names."""
    attention = _ATTENTION if config.latent is None else _LATENT_ATTENTION
    dense = [layer for layer in range(config.num_layers) if not config.has_experts(layer)]
    entries = (Rule(f"model.layers.{layer}.mlp", "entry") for layer in dense)
    return (*_ENDS, *attention, *_EXPERTS, *entries, *_FEED_FORWARD, *_NORMS)


def check_mesh(config: DecoderConfig, mesh: Mesh) -> None:
    """Refuse a mesh over which a decoder cannot be divided.

    Raises:
        ConfigError: something that is divided has a number that its axis does not divide.
    """
    experts = config.experts
    has_dense = any(not config.has_experts(layer) for layer in range(config.num_layers))
    shared = 0 if experts is None else experts.num_shared * experts.width
    counts = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_heads if config.latent is not None else config.num_kv_heads,
        "intermediate_size": config.intermediate_size if has_dense else 0,
        "width of shared experts": shared,
    }
    for name, count in counts.items():
        if count % mesh.tensor:
            raise _not_a_divisor("tensor", name, count, mesh.tensor)
    if mesh.tensor > 1 and config.positions == "alibi":
        must = "1 with ALiBi, whose slopes differ by head"
        raise ConfigError(describe("tensor", "the mesh", must, mesh.tensor))
    if mesh.expert > 1 and experts is None:
        must = "1 for a model without experts"
        raise ConfigError(describe("expert", "the mesh", must, mesh.expert))
    if experts is not None and experts.num_experts % (mesh.expert * mesh.tensor):
        both = mesh.expert * mesh.tensor
        raise _not_a_divisor("expert times tensor", "num_experts", experts.num_experts, both)
    if mesh.pipeline > config.num_layers:
        must = f"at most the number of layers ({config.num_layers})"
        raise ConfigError(describe("pipeline", "the mesh", must, mesh.pipeline))


def _not_a_divisor(axis: str, name: str, count: int, got: int) -> ConfigError:
    shared = [number for number in range(1, count + 1) if count % number == 0]
    step = f"{', '.join(map(str, shared))} divide it" if len(shared) < 20 else ""
    must = f"a divisor of the model's {name} ({count})"
    return ConfigError(describe(axis, "the mesh", must, got, step))
