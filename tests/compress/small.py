"""Small models and samples that the tests of quantization are made of."""

from __future__ import annotations

import torch

from deepseek.compress.calibration import Batch
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from tests.generate.conftest import TINY, byte_tokenizer

WIDE = TINY.replace(hidden_size=64, head_dim=16, intermediate_size=96)
"""Of whole groups of 32."""


def small_decoder(config: DecoderConfig = WIDE, seed: int = 0) -> Decoder:
    """Return a decoder with random weights whose channels are of different sizes."""
    torch.manual_seed(seed)
    model = Decoder(config.replace(init_std=0.15)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.exp(torch.randn_like(parameter)))
    model.tokenizer = byte_tokenizer(bos_token="<begin>")
    return model


def small_encoder(seed: int = 0) -> Encoder:
    """Return an encoder with random weights."""
    torch.manual_seed(seed)
    config = EncoderConfig(
        vocab_size=258, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96,
        max_positions=64, init_std=0.15,
    )  # fmt: skip
    model = Encoder(config).eval()
    model.tokenizer = byte_tokenizer(bos_token="<begin>")
    return model


def samples(
    count: int = 4, rows: int = 4, length: int = 24, *, padded: bool = False
) -> list[Batch]:
    """Return batches of random tokens, of rows of different lengths where padded."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(256, (rows, length), generator=generator)
        lengths = torch.randint(length // 2, length, (rows, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long() if padded else None
        found.append(Batch(ids, mask))
    return found


def skewed_gram(channels: int, seed: int = 0) -> torch.Tensor:
    """Return mean products of inputs whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator)
    sizes = torch.exp(torch.randn(channels, generator=generator))
    inputs = (torch.randn(1024, channels, generator=generator) @ mix) * sizes / channels**0.5
    return inputs.T @ inputs / 1024
