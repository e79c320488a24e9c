"""Small random encoders with a byte tokenizer."""

from __future__ import annotations

import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from deepseek.data import Tokenizer
from deepseek.models import Encoder, EncoderConfig

TINY_ENCODER = EncoderConfig(
    vocab_size=260,
    hidden_size=40,
    num_layers=3,
    num_heads=4,
    intermediate_size=57,
    max_positions=200,
)


def begun_and_ended() -> Tokenizer:
    """Return a tokenizer with one id a byte that puts `[CLS]` before a text and `[SEP]` behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *alphabet]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return Tokenizer(backend, pad_token="[PAD]")


def tiny_encoder(**changes: object) -> Encoder:
    """Return an encoder whose weights, norms and biases are all random."""
    torch.manual_seed(3)
    model = Encoder(TINY_ENCODER.replace(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2)
    model.tokenizer = begun_and_ended()
    return model
