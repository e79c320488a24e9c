"""Models that the tests of `verify` are made of: small, but with numbers of a usual size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deepseek.models import Decoder, Encoder
from deepseek.models.families import build_model, config_from_hf
from tests.hub.tiny import tiny_decoder, tiny_tokenizer

VOCABULARY = 330
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def drawn(model: nn.Module) -> None:
    """Draw weights anew: states neither vanish beside eps nor drown it."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            nn.init.normal_(parameter, 1.0, 0.1)
        else:
            nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.08)


def small_decoder(**changes: Any) -> Decoder:
    """Return a decoder of two layers with a tokenizer."""
    model = tiny_decoder(vocab_size=VOCABULARY, **changes)
    model.tokenizer = tiny_tokenizer()
    drawn(model)
    return model


def small_encoder(*, labels: tuple[str, ...] = ()) -> Encoder:
    """Return an encoder of two layers, a classifier where labels are given."""
    model = build_model(config_from_hf(BERT))
    assert isinstance(model, Encoder)
    if labels:
        model.use_labels(labels)
    drawn(model)
    return model.eval()
