"""What the tests of pruning share: tiny models with a tokenizer and a text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from deepseek.compress import Calibration, Work
from deepseek.compress.calibration import Batch
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from deepseek.models.families import build_model
from tests.hub.tiny import TEXT, tiny_tokenizer
from tests.models.zoo import randomize

IDS = torch.tensor([[1, 5, 9, 30, 2, 7, 11, 3, 80, 81, 33, 17], list(range(40, 52))])
BATCHES = [Batch(IDS, None)]

LLAMA = DecoderConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    intermediate_size=48,
    max_positions=128,
    tie_embeddings=True,
)
BERT = EncoderConfig(
    vocab_size=320,
    hidden_size=48,
    num_layers=3,
    num_heads=4,
    intermediate_size=80,
    max_positions=64,
)


def made(config: DecoderConfig | EncoderConfig, seed: int = 0) -> Decoder | Encoder:
    """Return a model with weights large enough to tell models apart."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    randomize(model)
    return model


def work_of(model: Decoder | Encoder, folder: Path) -> Work:
    """Return what a stage takes, with a tiny tokenizer."""
    model.tokenizer = tiny_tokenizer()
    return Work(model, folder, folder)


def calibration(folder: Path, samples: int = 4, length: int = 24) -> Calibration:
    """Return a calibration on a small text."""
    path = folder / "text.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return Calibration(text=str(path), samples=samples, length=length)


def zero_read(model: nn.Module, name: str, dim: int, places: torch.Tensor) -> None:
    """Set to zero what reads some places of a dimension."""
    weight = model.get_parameter(name)
    index = [slice(None)] * weight.dim()
    index[dim] = places  # type: ignore[call-overload]
    with torch.no_grad():
        weight[tuple(index)] = 0
