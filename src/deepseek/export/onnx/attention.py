"""Attention in ONNX: of standard operators, or as the one operator that ONNX Runtime has for it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from deepseek.export.onnx.graph import GraphWriter
from deepseek.graph import ProgramShape

MASKED = float(np.finfo(np.float32).min) / 2
"""Added to the score of what is not seen; half, so that a sum with a score stays finite."""


class Places(NamedTuple):
    """Where the tokens of a pass stand; all of its layers share it."""

    past: str
    """Tokens that the cache holds, int64 [1]; empty where there is none."""
    total: str
    """With those of the pass, int64 [1]."""
    queries: str
    """Positions of the pass's tokens, int64 [tokens]."""
    seen: str
    """Which slots hold tokens, bool [batch, 1, 1, total]."""
    scores: str
    """Shape of the scores by KV head: batch, KV heads, queries of one, tokens, total."""
    joined: str
    """Shape of the probabilities: batch, KV heads, queries of one times tokens, total."""


def read_places(graph: GraphWriter, shape: ProgramShape, mask: str, past_key: str | None) -> Places:
    """Add what a graph needs to know of its inputs' lengths.

    Args:
        graph: to add to.
        shape: of the model.
        mask: int64 [batch, total].
        past_key: of a layer, [batch, KV heads, past, head dim]; None without a cache.
    """
    total = graph.node("Shape", mask, start=1, end=2)
    past = "" if past_key is None else graph.node("Shape", past_key, start=2, end=3)
    rows = graph.node("Shape", mask, start=0, end=1)
    tokens = total if past == "" else graph.node("Sub", total, past)
    scalars = [graph.node("Squeeze", each) for each in ([total] if past == "" else [past, total])]
    first = graph.constant(0) if past == "" else scalars[0]
    queries = graph.node("Range", first, scalars[-1], graph.constant(1))
    seen = graph.node("Cast", mask, to=9)
    seen = graph.node("Unsqueeze", seen, graph.constant([1, 2]))
    heads = graph.constant([shape.num_kv_heads])
    group = shape.num_heads // shape.num_kv_heads
    scores = graph.node("Concat", rows, heads, graph.constant([group]), tokens, total, axis=0)
    by_head = graph.node("Mul", tokens, graph.constant([group]))
    joined = graph.node("Concat", rows, heads, by_head, total, axis=0)
    return Places(past, total, queries, seen, scores, joined)


def add_bias(graph: GraphWriter, places: Places, *, is_causal: bool, window: int | None) -> str:
    """Return what is added to the scores, float32 [batch, 1, tokens or 1, total]: 0 where a query
    sees a slot."""
    seen = places.seen
    if is_causal:
        zero, one = graph.constant(0), graph.constant(1)
        slots = graph.node("Range", zero, graph.node("Squeeze", places.total), one)
        rows = graph.node("Unsqueeze", places.queries, graph.constant([1]))
        earlier = graph.node("LessOrEqual", slots, rows)
        if window is not None:
            distance = graph.node("Sub", rows, slots)
            near = graph.node("Less", distance, graph.constant(window))
            earlier = graph.node("And", earlier, near)
        seen = graph.node("And", seen, earlier)
    values = (graph.constant(value, np.float32) for value in (0.0, MASKED))
    return graph.node("Where", seen, *values)


def rope_of(graph: GraphWriter, shape: ProgramShape, positions: str) -> tuple[str, str]:
    """Return cosine and signed sine, float32 [tokens, head dim] each."""
    angles = graph.constant([shape.inverse_frequencies], np.float32)
    places = graph.node("Cast", graph.node("Unsqueeze", positions, graph.constant([1])), to=1)
    turned = graph.node("Mul", places, angles)
    factor = graph.constant(shape.rope_factor, np.float32)
    cos = graph.node("Mul", graph.node("Cos", turned), factor)
    sin = graph.node("Mul", graph.node("Sin", turned), factor)
    signed = graph.node("Concat", graph.node("Neg", sin), sin, axis=-1)
    return graph.node("Concat", cos, cos, axis=-1), signed


def rotate(graph: GraphWriter, states: str, cos: str, sin: str) -> str:
    """Return states [batch, heads, tokens, head dim] turned by their angles."""
    first, second = graph.nodes("Split", states, outputs=2, axis=-1, num_outputs=2)
    swapped = graph.node("Concat", second, first, axis=-1)
    return graph.node("Add", graph.node("Mul", states, cos), graph.node("Mul", swapped, sin))


def attend(
    graph: GraphWriter,
    shape: ProgramShape,
    places: Places,
    queries: str,
    keys: str,
    values: str,
    bias: str,
) -> str:
    """Return attention [batch, tokens, heads * head dim] by standard operators.

    The query heads that share a KV head are rows of one product, so that keys are not repeated.

    Args:
        graph: to add to.
        shape: of the model.
        places: of the pass.
        queries: [batch, heads, tokens, head dim].
        keys, values: [batch, KV heads, total, head dim].
        bias: as `add_bias` gives it, with an axis more: [batch, 1, 1, tokens or 1, total].
    """
    dim, kv_heads = shape.head_dim, shape.num_kv_heads
    scaled = graph.node("Mul", queries, graph.constant(1 / math.sqrt(dim), np.float32))
    grouped = graph.node("Reshape", scaled, graph.constant([0, kv_heads, -1, dim]))
    turned = graph.node("Transpose", keys, perm=[0, 1, 3, 2])
    scores = graph.node("Reshape", graph.node("MatMul", grouped, turned), places.scores)
    shifted = graph.node("Add", scores, bias)
    shares = graph.node("Reshape", graph.node("Softmax", shifted, axis=-1), places.joined)
    summed = graph.node("MatMul", shares, values)
    by_head = graph.node("Reshape", summed, graph.constant([0, shape.num_heads, -1, dim]))
    turned = graph.node("Transpose", by_head, perm=[0, 2, 1, 3])
    return graph.node("Reshape", turned, graph.constant([0, 0, -1]))
