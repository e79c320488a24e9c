"""DeepSeek-V3: latent attention, shared and routed experts, YaRN."""

from __future__ import annotations

from typing import Any

from deepseek.errors import FormatError, describe
from deepseek.models.config import DecoderConfig, ExpertsConfig, LatentConfig
from deepseek.models.families.base import (
    Family,
    HFConfig,
    common_fields,
    read_rope,
    refuse,
    required,
    write_common,
)


def read_deepseek_v3(hf: HFConfig) -> DecoderConfig:
    """Return the config of a DeepSeek-V3 folder. Multi-token prediction layers are not used."""
    refuse(hf, "scoring_func", ("sigmoid",))
    refuse(hf, "moe_layer_freq", (1,))
    fields = common_fields(hf)
    biased = bool(hf.get("attention_bias", False))
    latent = LatentConfig(
        query_rank=hf.get("q_lora_rank"),
        kv_rank=required(hf, "kv_lora_rank"),
        nope_dim=required(hf, "qk_nope_head_dim"),
        rope_dim=required(hf, "qk_rope_head_dim"),
        value_dim=required(hf, "v_head_dim"),
    )
    fields["head_dim"] = latent.nope_dim + latent.rope_dim
    fields["num_kv_heads"] = fields["num_heads"]
    return DecoderConfig(
        family="deepseek_v3",
        rope=read_rope(hf, interleaved=bool(hf.get("rope_interleave", True))),
        qkv_bias=biased,
        output_bias=biased,
        latent=latent,
        experts=ExpertsConfig(
            num_experts=hf.get("n_routed_experts") or required(hf, "num_local_experts"),
            num_active=required(hf, "num_experts_per_tok"),
            width=required(hf, "moe_intermediate_size"),
            num_shared=hf.get("n_shared_experts") or 0,
            score="sigmoid",
            normalize=bool(hf.get("norm_topk_prob", True)),
            scale=float(hf.get("routed_scaling_factor") or 1.0),
            num_groups=hf.get("n_group") or 1,
            num_active_groups=hf.get("topk_group") or 1,
            dense_layers=tuple(
                range(min(hf.get("first_k_dense_replace", 3), fields["num_layers"]))
            ),
        ),
        **fields,
    )


def write_deepseek_v3(config: DecoderConfig) -> dict[str, Any]:
    """Return the DeepSeek-V3 fields of a config.

    Raises:
        FormatError: a layout the family cannot express.
    """
    latent, experts = config.latent, config.experts
    if latent is None or experts is None or experts.score != "sigmoid":
        must = "with latent attention and sigmoid-routed experts"
        raise FormatError(describe("config", "family deepseek_v3", must, config.family))
    first_dense = len(experts.dense_layers)
    if experts.dense_layers != tuple(range(first_dense)):
        must = "the first layers"
        raise FormatError(
            describe("dense_layers", "family deepseek_v3", must, experts.dense_layers)
        )
    written = write_common(config) | {
        "attention_bias": config.qkv_bias,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "qk_head_dim": latent.nope_dim + latent.rope_dim,
        "head_dim": latent.rope_dim,
        "rope_interleave": config.rope.interleaved,
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_active,
        "moe_intermediate_size": experts.width,
        "n_shared_experts": experts.num_shared,
        "norm_topk_prob": experts.normalize,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.num_groups,
        "topk_group": experts.num_active_groups,
        "first_k_dense_replace": first_dense,
        "num_nextn_predict_layers": 0,
    }
    return written


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    read_deepseek_v3,
    write_deepseek_v3,
    ignored=(r"rotary_emb\.inv_freq$",),
)
