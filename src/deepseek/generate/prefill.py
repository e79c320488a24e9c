"""Reading the prompts into the cache, in passes of a bounded number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.generate.memory import Memory
from deepseek.models import Decoder
from deepseek.models.sliding import forget
from deepseek.ops.attention import KVCache

MAX_PASS_TOKENS = 512
"""Most tokens of one pass, padding included: bounds the memory of activations."""


def prefill(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    memory: Memory | None = None,
) -> Tensor:
    """Append every prompt to its row of an empty cache; return the logits of the last tokens.

    Rows of similar length share a pass, padded on the right; a prompt longer than a pass goes
    through alone, in chunks. So neither memory nor the work on padding grows with the longest one.

    Args:
        model: the decoder.
        prompts: token ids, shortest prompt first.
        cache: new, one row per prompt.
        memory: what a row keeps when it is full; its length is no less than a pass.

    Returns:
        [rows, vocab]
    """
    logits: list[Tensor] = []
    groups = group_rows([len(prompt) for prompt in prompts])
    for start, stop in groups:
        rows = cache if len(groups) == 1 else _rows_of(cache, start, stop)
        if stop - start == 1:
            logits.append(_read_alone(model, prompts[start], rows, memory))
        else:
            logits.append(_read_together(model, prompts[start:stop], rows))
        cache.lengths[start:stop] = rows.lengths
    return logits[0] if len(logits) == 1 else torch.cat(logits)


def group_rows(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return ranges of rows that are read together, given ascending prompt lengths.

    A group of several rows fits one pass, and at most half of that pass is padding.
    """
    groups, start, tokens = [], 0, 0
    for row, length in enumerate(lengths):
        padded = (row + 1 - start) * length
        if row > start and (padded > MAX_PASS_TOKENS or padded > 2 * (tokens + length)):
            groups.append((start, row))
            start, tokens = row, 0
        tokens += length
    return [*groups, (start, len(lengths))]


def _read_alone(
    model: Decoder, prompt: Sequence[int], cache: KVCache, memory: Memory | None
) -> Tensor:
    tokens, output, start = torch.tensor([prompt], device=model.device), None, 0
    while start < len(prompt):
        stop = start + MAX_PASS_TOKENS
        if memory is not None:
            make_room(model, cache, 0, memory)
            stop = min(stop, start + memory.max_len - cache.lengths[0])
        output = model(tokens[:, start:stop], cache=cache, last_only=True)
        start = stop
    assert output is not None
    return output.logits[:, -1]


def make_room(model: Decoder, cache: KVCache, row: int, memory: Memory) -> None:
    """Let the oldest tokens of a row leave if it is full."""
    if cache.lengths[row] == memory.max_len:
        forget(model.config, cache, row, memory.first, memory.dropped)


def _read_together(model: Decoder, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = len(prompts[-1])
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = None
    if int(lengths[0]) < width:
        mask = torch.arange(width, device=model.device) < lengths[:, None]
    output = model(padded.to(model.device), mask, cache=cache, last_only=True)
    return output.logits[:, -1]


def _rows_of(cache: KVCache, start: int, stop: int) -> KVCache:
    """Return neighbouring rows of a contiguous cache, over the same memory."""
    layers = []
    for layer in cache.layers:
        table = layer.page_table[start:stop]
        first = None if layer.first_page is None else layer.first_page + start * table.shape[1]
        layers.append(dataclasses.replace(layer, page_table=table, first_page=first))
    return KVCache(layers, cache.lengths[start:stop], cache.tokens[start:stop])
