"""What a step costs in products, and how many this machine does."""

from __future__ import annotations

import functools
import time

import torch

from deepseek.models import Decoder, DecoderConfig, Encoder

_SIZE = 2048
_LOOKED_UP = ("model.embed_tokens", "embeddings.")


def flops_per_token(model: Decoder | Encoder, length: int) -> float:
    """Return floating-point operations of the products of a token, forward and backward.

    Two for each weight of a matrix that a token meets, and those of attention, three times over
    (Chowdhery et al., "PaLM" (2204.02311), appendix B). Weights that are not trained count in full,
    though they take a third less.

    Args:
        model: a decoder, whose tokens see half of the others, or an encoder.
        length: tokens of a sample.
    """
    config, met = model.config, 0.0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or name.startswith(_LOOKED_UP):
            continue
        share = 1.0
        if isinstance(config, DecoderConfig) and config.experts is not None and ".experts." in name:
            share = config.experts.num_active / config.experts.num_experts
        met += share * parameter.numel()
    if isinstance(config, DecoderConfig):
        attention = config.num_layers * config.num_heads * config.head_dim * length
    else:
        attention = 2 * config.num_layers * config.hidden_size * length
    return 3 * (2 * met + 2 * attention)


@functools.cache
def peak_flops(dtype: torch.dtype, num_threads: int) -> float:
    """Return the best of five products of two matrices of 2048 x 2048, in operations a second.

    Args:
        dtype: of the matrices.
        num_threads: those that PyTorch computes with; measured once for each number.
    """
    first, second = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    torch.mm(first, second)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(first, second)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best
