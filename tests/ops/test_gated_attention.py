"""Attention over pages with gates in C++ against a loop over queries: every storage, odd heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.native import ISAS, NEEDS_KERNELS, Native
from tests.ops.test_paged_attention import BOUNDS, attend, draw, reference

pytestmark = NEEDS_KERNELS


def program(
    isa: str,
    heads: tuple[int, int, int],
    table: np.ndarray,
    logits: np.ndarray,
    window: int,
    threshold: float,
) -> Native:
    """Return attention whose query, key, value and gate logits of token i are row i of `table`."""
    num_heads, kv_heads, dim = heads
    width, qkv = num_heads * dim, (num_heads + 2 * kv_heads) * dim
    whole = np.concatenate((table, logits), 1)
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "linear", "input": 0, "output": 1, "weights": [1]},
        {"op": "linear", "input": 0, "output": 2, "weights": [2], "closes_below": threshold},
        {"op": "attend", "input": 1, "output": 3, "layer": 0, "window": window, "gates": 2},
        {"op": "linear", "input": 3, "output": -1, "weights": [3], "selected": 1},
    ]
    widths = [qkv + num_heads, qkv, num_heads, width]
    native = Native(isa, widths, instructions, vocab=max(len(table), width), heads=heads)
    identity = np.eye(qkv + num_heads, dtype=np.float32)
    weights = (whole, identity[:qkv].copy(), identity[qkv:].copy(), np.eye(width, dtype=np.float32))
    for weight in weights:
        native.weight(weight)
    native.program.start()
    native.width = width
    return native


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(BOUNDS))
@settings(max_examples=5, deadline=None)
@given(
    heads=st.sampled_from([(1, 1, 24), (3, 3, 64), (6, 2, 16), (7, 1, 2), (50, 1, 4)]),
    count=st.sampled_from([1, 2, 63, 65, 130, 300]),
    window=st.sampled_from([0, 5, 100]),
    threshold=st.sampled_from([0.0, 0.3, 1.0, 1.9]),
    seed=st.integers(0, 2**16),
)
def test_a_closed_head_gives_zeros_and_an_open_one_its_share(
    isa: str,
    kind: str,
    heads: tuple[int, int, int],
    count: int,
    window: int,
    threshold: float,
    seed: int,
) -> None:
    """A whole text, and the same bits token by token."""
    table, dim = draw(heads, count, seed), heads[2]
    logits = np.random.default_rng(seed).normal(0, 2, (count, heads[0])).astype(np.float32)
    gates = 2 / (1 + np.exp(-logits.astype(np.float64)))
    logits[np.abs(gates - threshold) < 1e-5] += 1e-3  # Beyond what single precision may round.
    gates = 2 / (1 + np.exp(-logits.astype(np.float64)))
    is_closed = gates < threshold
    native = program(isa, heads, table, logits, window, threshold)
    found = attend(native, kind, count, [512]).reshape(count, heads[0], dim)
    assert native.program.gated_heads == (is_closed.size, int(is_closed.sum()))
    assert not found[is_closed].any()
    plain = reference(heads, table, window).reshape(count, heads[0], dim)
    off = np.abs(found - np.where(is_closed, 0, gates)[..., None] * plain)
    assert off.max() <= 2 * BOUNDS[kind]
    alone = attend(native, kind, count, [1]).reshape(found.shape)
    assert np.array_equal(alone, found)
