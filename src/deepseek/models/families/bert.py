"""BERT and MiniLM: the encoder family."""

from __future__ import annotations

from typing import Any

from deepseek.models.config import EncoderConfig
from deepseek.models.families.base import Family, HFConfig, refuse, required


def read_bert(hf: HFConfig) -> EncoderConfig:
    """Return the config of a BERT folder."""
    refuse(hf, "position_embedding_type", ("absolute",))
    refuse(hf, "hidden_act", ("gelu", "gelu_new", "relu"))
    return EncoderConfig(
        vocab_size=required(hf, "vocab_size"),
        hidden_size=required(hf, "hidden_size"),
        num_layers=required(hf, "num_hidden_layers"),
        num_heads=required(hf, "num_attention_heads"),
        intermediate_size=required(hf, "intermediate_size"),
        max_positions=hf.get("max_position_embeddings") or 512,
        num_token_types=hf.get("type_vocab_size") or 2,
        norm_eps=float(hf.get("layer_norm_eps") or 1e-12),
        activation=hf.get("hidden_act") or "gelu",
        init_std=float(hf.get("initializer_range") or 0.02),
        pad_token_id=hf.get("pad_token_id"),
    )


def write_bert(config: EncoderConfig) -> dict[str, Any]:
    """Return the BERT fields of a config."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "initializer_range": config.init_std,
        "pad_token_id": config.pad_token_id,
        "position_embedding_type": "absolute",
    }


BERT = Family(
    "bert",
    "BertModel",
    read_bert,
    write_bert,
    renames=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    ignored=(r"position_ids$", r"^cls\."),
)
