"""BERT and MiniLM: the encoder family."""

from __future__ import annotations

from typing import Any

from deepseek.errors import FormatError, describe
from deepseek.models.config import EncoderConfig
from deepseek.models.families.base import Family, HFConfig, refuse, required

_CLASSIFIER = "BertForSequenceClassification"


def read_bert(hf: HFConfig) -> EncoderConfig:
    """Return the config of a BERT folder."""
    refuse(hf, "position_embedding_type", ("absolute",))
    refuse(hf, "hidden_act", ("gelu", "gelu_new", "relu"))
    labels = _labels(hf) if _CLASSIFIER in (hf.get("architectures") or ()) else ()
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
        labels=labels,
    )


def _labels(hf: HFConfig) -> tuple[str, ...]:
    """Return the names of a classifier's classes; without them transformers has two."""
    refuse(hf, "problem_type", (None, "single_label_classification"))
    names = {int(number): name for number, name in (hf.get("id2label") or {}).items()}
    if not names:
        return ("LABEL_0", "LABEL_1")
    if sorted(names) != list(range(len(names))):
        must = "numbered from 0 without a gap"
        raise FormatError(describe("id2label", "config.json", must, sorted(names)[:5]))
    return tuple(names[number] for number in range(len(names)))


def write_bert(config: EncoderConfig) -> dict[str, Any]:
    """Return the BERT fields of a config."""
    written = {
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
    if config.labels:
        written["id2label"] = {str(number): name for number, name in enumerate(config.labels)}
        written["label2id"] = {name: number for number, name in enumerate(config.labels)}
        written["problem_type"] = "single_label_classification"
    return written


BERT = Family(
    "bert",
    "BertModel",
    read_bert,
    write_bert,
    renames=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    classifier=_CLASSIFIER,
    body="bert.",
    ignored=(r"position_ids$", r"^cls\."),
)
