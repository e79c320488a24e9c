"""Taking the oldest tokens out of a cache: what stays moves up, its keys turned back."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.errors import ShapeError, describe
from deepseek.models.config import DecoderConfig
from deepseek.models.positions import inverse_frequencies
from deepseek.ops.attention import KVCache
from deepseek.ops.rope import rotate


def forget(config: DecoderConfig, cache: KVCache, row: int, first: int, dropped: int) -> None:
    """Take the `dropped` tokens behind the first `first` ones out of a row of a cache.

    Args:
        config: of the model that filled it.
        cache: contiguous; changed in place.
        row: which.
        first: tokens at the start that stay where they are.
        dropped: tokens behind them that leave; those behind these take their places, as if they had
            come so much earlier.

    Raises:
        ShapeError: the row has not so many tokens.
    """
    length = cache.lengths[row]
    if min(first, dropped) < 0 or first + dropped > length:
        must = f"at most the {length} tokens of the row"
        raise ShapeError(describe("first + dropped", "forget", must, first + dropped))
    old, new = slice(first + dropped, length), slice(first, length - dropped)
    for layer in cache.layers:
        keys, values = (each[row] for each in layer.in_rows())
        keys[new] = _turned_back(config, keys[old].clone(), dropped)
        if layer.value_pages.data_ptr() != layer.key_pages.data_ptr():
            values[new] = values[old].clone()
        for page in layer.page_table[row].tolist():
            layer.choices.pop(page, None)
    cache.tokens[row, new] = cache.tokens[row, old].clone()
    cache.lengths[row] = length - dropped


def _turned_back(config: DecoderConfig, keys: Tensor, by: int) -> Tensor:
    """Return keys [S, KV heads, dim] at positions that lie `by` earlier."""
    if config.positions != "rope":
        return keys
    dim = config.head_dim if config.latent is None else config.latent.rope_dim
    # within the context the dynamic rule stretches nothing
    context = config.max_positions
    angles = -by * inverse_frequencies(config.rope, dim, context, context).double()
    angles = angles.to(keys.device)
    cos, sin = angles.cos().to(torch.float32), angles.sin().to(torch.float32)
    turned = keys[..., keys.shape[-1] - dim :]
    cos, sin = torch.cat((cos, cos)), torch.cat((-sin, sin))
    turned.copy_(rotate(turned.float(), cos, sin))
    return keys
