"""Llama / SmolLM2, Mistral, Qwen2, Qwen3 and Qwen3-MoE: their configs, read and written."""

from __future__ import annotations

from typing import Any

from deepseek.errors import FormatError, describe
from deepseek.models.config import DecoderConfig, ExpertsConfig
from deepseek.models.families.base import (
    Family,
    HFConfig,
    common_fields,
    read_rope,
    refuse,
    required,
    write_common,
)


def read_llama(hf: HFConfig) -> DecoderConfig:
    """Return the config of a Llama or SmolLM2 folder."""
    biased = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        family="llama",
        rope=read_rope(hf),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        **common_fields(hf),
    )


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    """Return the Llama fields of a config."""
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_common(config) | biases


def read_mistral(hf: HFConfig) -> DecoderConfig:
    """Return the config of a Mistral folder: every layer slides when a window is given."""
    window = hf.get("sliding_window")
    layers = tuple(range(required(hf, "num_hidden_layers"))) if window else ()
    rope = read_rope(hf)
    return DecoderConfig(
        family="mistral", rope=rope, window=window, window_layers=layers, **common_fields(hf)
    )


def write_mistral(config: DecoderConfig) -> dict[str, Any]:
    """Return the Mistral fields of a config."""
    return write_common(config) | {"sliding_window": config.window}


def read_qwen2(hf: HFConfig) -> DecoderConfig:
    """Return the config of a Qwen2 folder."""
    window, layers = _windows(hf)
    return DecoderConfig(
        family="qwen2",
        rope=read_rope(hf),
        qkv_bias=True,
        window=window,
        window_layers=layers,
        **common_fields(hf),
    )


def read_qwen3(hf: HFConfig) -> DecoderConfig:
    """Return the config of a Qwen3 folder."""
    biased = bool(hf.get("attention_bias", False))
    window, layers = _windows(hf)
    return DecoderConfig(
        family="qwen3",
        rope=read_rope(hf),
        qk_norm=True,
        qkv_bias=biased,
        output_bias=biased,
        window=window,
        window_layers=layers,
        **common_fields({"head_dim": 128, **hf}),
    )


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """Return the Qwen2 fields of a config."""
    sliding = set(config.window_layers)
    kinds = [
        "sliding_attention" if layer in sliding else "full_attention"
        for layer in range(config.num_layers)
    ]
    return write_common(config) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": config.num_layers - len(sliding),
        "layer_types": kinds,
    }


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    """Return the Qwen3 fields of a config."""
    return write_qwen2(config) | {"attention_bias": config.qkv_bias}


def read_qwen3_moe(hf: HFConfig) -> DecoderConfig:
    """Return the config of a Qwen3-MoE folder."""
    refuse(hf, "use_sliding_window", (False, None))
    num_layers = required(hf, "num_hidden_layers")
    step = hf.get("decoder_sparse_step") or 1
    named = set(hf.get("mlp_only_layers") or ())
    dense = tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    biased = bool(hf.get("attention_bias", False))
    num_experts = hf.get("num_experts") or required(hf, "num_local_experts")
    return DecoderConfig(
        family="qwen3_moe",
        rope=read_rope(hf),
        qk_norm=True,
        qkv_bias=biased,
        output_bias=biased,
        experts=ExpertsConfig(
            num_experts=num_experts,
            num_active=required(hf, "num_experts_per_tok"),
            width=required(hf, "moe_intermediate_size"),
            normalize=bool(hf.get("norm_topk_prob", False)),
            dense_layers=dense,
        ),
        **common_fields(hf),
    )


def write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    """Return the Qwen3-MoE fields of a config.

    Raises:
        FormatError: experts the family cannot express.
    """
    experts = config.experts
    if experts is None or experts.num_shared or experts.score != "softmax" or experts.scale != 1.0:
        must = "softmax-routed without shared experts, as Qwen3-MoE has them"
        raise FormatError(describe("experts", "DecoderConfig", must, experts))
    return write_common(config) | {
        "attention_bias": config.qkv_bias,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_active,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.normalize,
        "mlp_only_layers": list(experts.dense_layers),
        "decoder_sparse_step": 1,
    }


def _windows(hf: HFConfig) -> tuple[int | None, tuple[int, ...]]:
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    if window is None:
        return None, ()
    num_layers = required(hf, "num_hidden_layers")
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        return window, tuple(range(first, num_layers))
    return window, tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


LLAMA = Family(
    "llama", "LlamaForCausalLM", read_llama, write_llama, ignored=(r"rotary_emb\.inv_freq$",)
)
MISTRAL = Family("mistral", "MistralForCausalLM", read_mistral, write_mistral)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_qwen3_moe, write_qwen3_moe)
