"""The log-sum-exp of every execution, with gradients, and attention that is merged by it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError, ShapeError
from deepseek.ops.attention import (
    AttentionImpl,
    BlockTable,
    DenseKV,
    Layout,
    attention,
    choose,
    gathered,
    merge,
    tiled,
)
from tests.ops.strategies import layouts, tables
from tests.ops.test_attention import HEADS, a_window, random_inputs
from tests.tolerances import assert_close


def results_of(run, inputs, weight, lse_weight) -> list[torch.Tensor]:
    """Return outputs, log-sum-exp (0 in place of infinity) and the gradients of both, which come
    to blind queries too."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out, lse = run(*leaves)
    torch.autograd.backward([out, lse], [weight, lse_weight])
    assert not bool(lse.isnan().any()) and not bool((lse == math.inf).any())
    shown = torch.where(lse.isfinite(), lse, 0.0)
    return [out.detach(), shown.detach(), lse.isinf().float(), *(leaf.grad for leaf in leaves)]


def drawn_weights(inputs) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, length, _ = inputs[0].shape
    return torch.randn(rows, heads, length, inputs[2].shape[-1]), torch.randn(rows, heads, length)


def test_the_log_sum_exp_is_what_it_says() -> None:
    """One head; query 0 sees slot 0, query 1 sees both, with ALiBi."""
    queries, keys = torch.tensor([[[[2.0], [3.0]]]]), torch.tensor([[[[0.5], [-1.0]]]])
    kv, layout, slopes = DenseKV(keys, torch.zeros(1, 1, 2, 1)), Layout.dense(1, 2), torch.ones(1)
    _, lse = attention(
        queries, kv, layout, slopes=slopes, scale=2.0, impl="reference", return_lse=True
    )
    expected = torch.tensor([2.0, math.log(math.exp(3.0 - 1.0) + math.exp(-6.0))])
    assert_close(lse[0, 0], expected)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_gathered_has_the_references_log_sum_exp(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(tables(layout, heads, kv_heads, means=False))
    inputs = random_inputs(layout, heads, kv_heads)
    weights = drawn_weights(inputs)

    def run(impl: AttentionImpl):
        return lambda queries, keys, values: attention(
            queries, DenseKV(keys, values), layout, table=table, impl=impl, return_lse=True
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "CHUNK_SCORES", data.draw(st.sampled_from([1, 200, 1 << 20])))
        expected, actual = (results_of(run(i), inputs, *weights) for i in ("reference", "gathered"))
    for one, other in zip(expected, actual, strict=True):
        assert_close(other, one)


@pytest.mark.parametrize("heads,kv_heads", HEADS)
@pytest.mark.parametrize("length", [1, 128, 300])
def test_blocked_has_the_references_log_sum_exp(heads: int, kv_heads: int, length: int) -> None:
    layout = Layout.dense(2, length)
    inputs = random_inputs(layout, heads, kv_heads)
    weights = drawn_weights(inputs)
    found = [
        results_of(
            lambda q, k, v, impl=impl: attention(
                q, DenseKV(k, v), layout, impl=impl, return_lse=True
            ),
            inputs,
            *weights,
        )
        for impl in ("reference", "blocked")
    ]
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["blocked", "gathered", "reference"])
def test_output_and_log_sum_exp_have_gradients_in_float64(impl: AttentionImpl) -> None:
    layout = Layout.dense(1, 7)
    table = None if impl == "blocked" else a_window(7, 2, 2)
    shapes = [(1, 2, 7, 3), (1, 1, 7, 3), (1, 1, 7, 3)]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(queries, keys, values):
        kv = DenseKV(keys, values)
        return attention(queries, kv, layout, table=table, impl=impl, return_lse=True)

    assert torch.autograd.gradcheck(run, leaves)


def test_who_gives_it_and_who_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "why_missing", lambda: "no compiler")
    layout, sparse = Layout.dense(1, 64), a_window(64, 2)
    queries, keys, values = random_inputs(layout, 2, 1)
    kv = DenseKV(keys, values)
    assert choose(queries, kv, layout, return_lse=True) == "blocked"
    assert choose(queries, kv, layout, sparse, return_lse=True) == "gathered"
    assert choose(queries, kv, layout, sparse, torch.rand(2), return_lse=True) == "reference"
    both = Layout.dense(1, 64, causal=False)
    assert choose(queries, kv, both, return_lse=True) == "reference"
    with pytest.raises(ConfigError, match=r"return_lse of attention must be False for the sdpa"):
        attention(queries, kv, layout, impl="sdpa", return_lse=True)
    out, lse = attention(
        queries.bfloat16(), DenseKV(keys.bfloat16(), values.bfloat16()), layout, return_lse=True
    )
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_parts_over_disjoint_keys_merge_to_one_softmax(data: st.DataObject) -> None:
    """The entries of a table are dealt out to two or three, by skip bits."""
    layout = data.draw(layouts())
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(tables(layout, heads, kv_heads, means=False))
    slopes = data.draw(st.sampled_from([None, torch.rand(heads)]))
    count = data.draw(st.integers(2, 3))
    shape = (layout.num_rows, heads, *table.indices.shape[2:])
    owner = torch.randint(count, shape)
    skip = torch.zeros(shape, dtype=torch.bool) if table.skip is None else table.skip
    inputs = random_inputs(layout, heads, kv_heads)
    weights = drawn_weights(inputs)

    def part(queries, keys, values, each: BlockTable):
        impl = "auto" if slopes is None else "reference"
        kv = DenseKV(keys, values)
        return attention(queries, kv, layout, table=each, slopes=slopes, impl=impl, return_lse=True)

    def merged(*leaves):
        dealt = [
            dataclasses.replace(table, skip=skip | (owner != number), memo={})
            for number in range(count)
        ]
        return merge([part(*leaves, each) for each in dealt])

    def whole(queries, keys, values):
        kv = DenseKV(keys, values)
        return attention(
            queries, kv, layout, table=table, slopes=slopes, impl="reference", return_lse=True
        )

    found = (results_of(run, inputs, *weights) for run in (whole, merged))
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected)


def test_a_text_in_slices_merges_as_a_ring_does() -> None:
    """Queries of the second half: their own half causally, the first half whole."""
    queries, keys, values = random_inputs(Layout.dense(2, 80), 4, 2)
    late = queries[:, :, 40:]
    causal, across = Layout.dense(2, 40), Layout.dense(2, 40, causal=False)
    own = attention(late, DenseKV(keys[:, :, 40:], values[:, :, 40:]), causal, return_lse=True)
    other = attention(late, DenseKV(keys[:, :, :40], values[:, :, :40]), across, return_lse=True)
    out, _ = merge([own, other])
    whole = attention(queries, DenseKV(keys, values), Layout.dense(2, 80), impl="reference")
    assert_close(out, whole[:, :, 40:])


def test_parts_that_do_not_fit_are_refused() -> None:
    one = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))
    for parts in ([], [one, (one[0][:, :1], one[1][:, :1])]):
        with pytest.raises(ShapeError, match="parts of merge must be at least one, all of the"):
            merge(parts)
