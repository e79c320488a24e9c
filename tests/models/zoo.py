"""Tiny random models of every family, made by transformers: the reference implementation."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from deepseek.models import Decoder, DecoderConfig
from deepseek.models.families import build_model, config_from_hf, state_from_hf

TINY = DecoderConfig(
    vocab_size=50,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=32,
)
"""A decoder of our own that no case below is like."""
BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
V3_ROPE = ROPE["yarn"] | {"rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 0.8}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-mha": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-biased": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-wide-heads": ("Llama", {"head_dim": 20}),
    **{
        f"llama-{kind}": ("Llama", {"rope_parameters": rope | {"rope_theta": 5000.0}})
        for kind, rope in ROPE.items()
    },
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3Moe", EXPERTS | {"mlp_only_layers": [1], "head_dim": 16}),
    "deepseek-v3": ("DeepseekV3", LATENT | {"q_lora_rank": 24, "rope_parameters": V3_ROPE}),
    "deepseek-v3-full-query": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
}


def reference(case: str, **changes: Any) -> nn.Module:
    """Return transformers' model of a case with weights large enough to tell models apart."""
    name, fields = CASES[case]
    config = getattr(transformers, f"{name}Config")(**BASE | fields | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Draw every weight anew, norms and the routers' balancing bias included."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name.lower() and name.endswith("weight"):
                tensor.normal_(1.0, 0.1)
            elif "e_score_correction_bias" in name:
                tensor.uniform_(-0.2, 0.2)
            elif "inv_freq" not in name and tensor.is_floating_point():
                tensor.normal_(0.0, 0.1)


def ours(theirs: nn.Module) -> Decoder:
    """Return our model of the same config and weights."""
    config = config_from_hf(theirs.config.to_dict())
    with torch.device("meta"):
        model = build_model(config)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    missing, unexpected = model.load_state_dict(
        state_from_hf(config, state), strict=False, assign=True
    )
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    assert isinstance(model, Decoder)
    return model.eval()
