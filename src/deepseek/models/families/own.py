"""Our own family: any decoder config as it is, for models that no other family can express."""

from __future__ import annotations

from typing import Any

from deepseek.config import Config
from deepseek.models.config import DecoderConfig
from deepseek.models.families.base import Family, HFConfig

OWN_MODEL_TYPE = "deepseek_stack"
OWN_ARCHITECTURE = "DeepseekStackForCausalLM"


def read_own(hf: HFConfig) -> DecoderConfig:
    """Return the config that `write_own` wrote; fields of other tools beside it are ignored."""
    return DecoderConfig.from_dict(hf["decoder_config"]).replace(family=OWN_MODEL_TYPE)


def write_own(config: Config) -> dict[str, Any]:
    """Return the whole config, as one field; the names transformers asks every config for stand
    beside it."""
    fields = config.to_dict()
    beside = {
        name: fields[name] for name in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")
    }
    return beside | {
        "decoder_config": fields,
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": fields["num_heads"],
        "pad_token_id": fields["pad_token_id"],
        "tie_word_embeddings": fields["tie_embeddings"],
    }


OWN = Family(OWN_MODEL_TYPE, OWN_ARCHITECTURE, read_own, write_own)
