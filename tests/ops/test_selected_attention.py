"""Attention of the queries that are wanted: theirs is the reference's, the others' is zeros and
costs nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ShapeError
from deepseek.ops.attention import DenseKV, KVCache, KVShape, Layout, attention, selected
from tests.ops.strategies import layouts, tables
from tests.ops.test_attention import HEADS, random_inputs
from tests.tolerances import assert_close


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_is_wanted_equals_the_reference_with_gradients(data: st.DataObject) -> None:
    """Padding, caches, tables, ALiBi; a block of places at a time or all in one."""
    layout = data.draw(layouts())
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(st.one_of(st.none(), tables(layout, heads, kv_heads)))
    if table is not None:
        table = dataclasses.replace(table, means=False)
    slopes = data.draw(st.sampled_from([None, torch.rand(heads)]))
    inputs = random_inputs(layout, heads, kv_heads)
    share = data.draw(st.sampled_from([0.0, 0.2, 0.8]))
    wanted = torch.rand(inputs[0].shape[:-1]) < share
    weight = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1])
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "BLOCK", data.draw(st.sampled_from([1, 7, 128])))
        for impl in ("reference", "auto"):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            kv = DenseKV(leaves[1], leaves[2])
            out = attention(
                leaves[0], kv, layout, table=table, slopes=slopes, wanted=wanted, impl=impl
            )
            assert not out[~wanted].any()
            # behind nothing that is wanted there is no gradient at all
            ((out * weight).sum() + 0 * sum(leaf.sum() for leaf in leaves)).backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


def test_what_is_not_wanted_is_not_read() -> None:
    """Values that are no numbers would show wherever they are multiplied, by zero too."""
    layout = Layout.dense(1, 300)
    queries, keys, values = random_inputs(layout, 6, 3)
    wanted = torch.ones(1, 6, 300, dtype=torch.bool)
    wanted[:, 2:4] = False
    keys[:, 1], values[:, 1] = torch.nan, torch.nan
    out = attention(queries, DenseKV(keys, values), layout, wanted=wanted)
    assert bool(out.isfinite().all())
    wanted[:, 2, 10] = True
    out = attention(queries, DenseKV(keys, values), layout, wanted=wanted)
    assert bool(out[0, 2, 10].isnan().all())


def test_a_new_token_over_pages() -> None:
    """Rows of different lengths, each with heads of its own."""
    cache = KVCache.contiguous([KVShape(2, 8, 6)], 3, 200, dtype=torch.float32)
    pages = cache.layers[0]
    for counts in ([130, 5, 64], [1, 1, 1]):
        layout = cache.place(max(counts), counts)
        _, keys, values = random_inputs(Layout.dense(3, max(counts)), 4, 2)
        pages.write(keys, values, layout)
        cache.advance(layout)
    queries = torch.randn(3, 4, 1, 8)
    wanted = torch.rand(3, 4, 1) < 0.5
    wanted[1] = False
    both = [
        attention(queries, pages, layout, wanted=wanted, impl=impl)
        for impl in ("reference", "auto")
    ]
    assert_close(both[1], both[0])
    assert not both[1][1].any()


def test_bfloat16_is_computed_as_elsewhere() -> None:
    layout = Layout.dense(2, 90)
    queries, keys, values = (each.bfloat16() for each in random_inputs(layout, 4, 2))
    wanted = torch.rand(2, 4, 90) < 0.6
    kv = DenseKV(keys, values)
    found = attention(queries, kv, layout, wanted=wanted)
    assert found.dtype == torch.bfloat16
    assert_close(found, attention(queries, kv, layout, wanted=wanted, impl="reference"))


def test_one_bit_for_each_query_is_asked_for() -> None:
    layout = Layout.dense(2, 9)
    queries, keys, values = random_inputs(layout, 4, 2)
    with pytest.raises(ShapeError, match=r"wanted of attention must be of shape \[2, 4, 9\]"):
        attention(queries, DenseKV(keys, values), layout, wanted=torch.ones(2, 9, 4).bool())
