"""Attention: the reference against loops, every execution against the reference, with gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError, ShapeError
from deepseek.ops.attention import (
    AttentionImpl,
    BlockTable,
    DenseKV,
    KVCache,
    KVShape,
    Layout,
    attention,
    choose,
    gathered,
    tiled,
)
from deepseek.ops.cpu import why_missing
from tests.ops.brute_force import brute_force
from tests.ops.strategies import layouts, tables
from tests.tolerances import assert_close

HEADS = [(1, 1), (4, 2), (6, 2), (3, 1)]
BLOCKS = (16, 32, 64, 128)
LENGTHS = [1, 63, 65, 130]


def random_inputs(layout: Layout, heads: int, kv_heads: int, dim: int = 8, value_dim: int = 6):
    rows = layout.num_rows
    queries = torch.randn(rows, heads, layout.num_queries, dim)
    keys = torch.randn(rows, kv_heads, layout.num_slots, dim)
    return queries, keys, torch.randn(rows, kv_heads, layout.num_slots, value_dim)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_reference_equals_loops(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(st.one_of(st.none(), tables(layout, heads, kv_heads)))
    slopes = data.draw(st.sampled_from([None, torch.rand(heads)]))
    if table is not None:
        table.check(layout, heads, kv_heads)
    queries, keys, values = random_inputs(layout, heads, kv_heads)
    kv = DenseKV(keys, values)
    out = attention(queries, kv, layout, table=table, slopes=slopes, impl="reference")
    assert_close(out, brute_force(queries, keys, values, layout, table, slopes), torch.float32)


def test_means_equal_loops() -> None:
    """Blocks of three that are not listed, whole or with masked tokens, with and without ALiBi."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 4:6] = False
    layout = Layout.dense(2, 12, mask)
    own = torch.arange(4, dtype=torch.int32)
    table = BlockTable(own[None, None, :, None], torch.ones(1, 1, 4).int(), 3, means=True)
    queries, keys, values = random_inputs(layout, 4, 2)
    for slopes in (None, torch.rand(4)):
        out = attention(
            queries, DenseKV(keys, values), layout, table=table, slopes=slopes, impl="reference"
        )
        assert_close(out, brute_force(queries, keys, values, layout, table, slopes), torch.float32)


GENERAL = ["reference", "sdpa"] + (["tiled"] if why_missing() is None else [])
"""Executions that take every layout; `flex` is tested in `test_gpu_attention.py`."""


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C++ compiler was here."""
    monkeypatch.setattr(tiled, "why_missing", lambda: "no compiler")


@pytest.mark.parametrize("impl", [name for name in GENERAL if name != "reference"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_executions_equal_reference_with_gradients(impl: str, data: st.DataObject) -> None:
    layout = data.draw(layouts())
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(st.one_of(st.none(), tables(layout, heads, kv_heads)))
    slopes = data.draw(st.sampled_from([None, torch.rand(heads)]))
    inputs = random_inputs(layout, heads, kv_heads)
    results = []
    weight = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1])
    for name in ("reference", impl):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        kv = DenseKV(leaves[1], leaves[2])
        out = attention(leaves[0], kv, layout, table=table, slopes=slopes, impl=name)
        (out * weight).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_gathered_equals_reference_with_gradients(data: st.DataObject) -> None:
    """Any table, a few query blocks at a time."""
    layout = data.draw(layouts())
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(tables(layout, heads, kv_heads, means=False))
    inputs = random_inputs(layout, heads, kv_heads)
    weight = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1])
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "CHUNK_SCORES", data.draw(st.sampled_from([1, 200, 1 << 20])))
        for name in ("reference", "gathered"):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            kv = DenseKV(leaves[1], leaves[2])
            out = attention(leaves[0], kv, layout, table=table, impl=name)
            (out * weight).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["gathered", "sdpa"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tables_of_real_blocks_equal_reference_with_gradients(
    impl: str, data: st.DataObject
) -> None:
    """Blocks of 16 to 128, ragged lists, rows of different lengths, groups of 1, 3 and 4."""
    layout = data.draw(layouts(longest=200))
    heads, kv_heads = data.draw(st.sampled_from([(2, 2), (6, 2), (4, 1)]))
    table = data.draw(tables(layout, heads, kv_heads, BLOCKS, means=False))
    inputs = random_inputs(layout, heads, kv_heads)
    weight = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1])
    results = []
    for name in ("reference", impl):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        kv = DenseKV(leaves[1], leaves[2])
        out = attention(leaves[0], kv, layout, table=table, impl=name)
        (out * weight).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


def a_window(length: int, width: int, block: int = 16) -> BlockTable:
    own = torch.arange(-(-length // block), dtype=torch.int32)
    listed = (own[:, None] - torch.arange(width, dtype=torch.int32)).clamp(min=0)
    return BlockTable(listed[None, None], (own + 1).clamp(max=width)[None, None], block)


def test_gathered_has_the_gradients_of_its_output() -> None:
    layout = Layout.dense(1, 7)
    shapes = [(1, 2, 7, 3), (1, 1, 7, 3), (1, 1, 7, 3)]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(queries, keys, values):
        kv = DenseKV(keys, values)
        return attention(queries, kv, layout, table=a_window(7, 2, 2), impl="gathered")

    assert torch.autograd.gradcheck(run, leaves)


def test_gathered_in_bfloat16_is_as_near_as_a_mask() -> None:
    layout = Layout.dense(2, 200)
    table = a_window(200, 5)
    inputs = random_inputs(layout, 6, 2, 64, 64)
    weight = torch.randn(2, 6, 200, 64)

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
        kv = DenseKV(leaves[1], leaves[2])
        out = attention(leaves[0], kv, layout, table=table, impl=impl)
        (out.float() * weight).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact = run("reference", torch.float32)
    errors = {
        impl: [
            float((found.float() - right).norm() / right.norm())
            for found, right in zip(run(impl, torch.bfloat16), exact, strict=True)
        ]
        for impl in ("sdpa", "gathered")
    }
    for gathered_error, masked_error in zip(*reversed(errors.values()), strict=True):
        assert gathered_error < 2 * masked_error


def test_gathered_adds_up_gradients_of_many_blocks_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Block 0 is seen by 256 query blocks, one after the other; sums in float16 would drift."""
    monkeypatch.setattr(gathered, "CHUNK_SCORES", 1)
    layout = Layout.dense(1, 1024)
    own = torch.arange(256, dtype=torch.int32)
    listed = torch.stack((own, torch.zeros_like(own)), -1)
    table = BlockTable(listed[None, None], (own + 1).clamp(max=2)[None, None], 4)
    inputs = [each.half() for each in random_inputs(layout, 1, 1)]

    def gradient(impl: AttentionImpl, dtype: torch.dtype) -> torch.Tensor:
        queries, keys, values = (each.to(dtype) for each in inputs)
        values.requires_grad_()
        attention(queries, DenseKV(keys, values), layout, table=table, impl=impl).sum().backward()
        assert values.grad is not None
        return values.grad[0, 0, :4].double()

    exact = gradient("reference", torch.float64)
    error = (gradient("gathered", torch.float16) - exact).abs() / exact.abs()
    assert float(error.max()) < 1e-3


def test_gathered_keeps_what_grows_with_the_text_alone() -> None:
    """Queries, keys and values, filled up to whole blocks: no scores, no gathered keys."""
    layout = Layout.dense(1, 320)
    inputs = [each.requires_grad_() for each in random_inputs(layout, 4, 2)]
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(inputs[0], DenseKV(*inputs[1:]), layout, table=a_window(320, 9), impl="gathered")
    assert sum(kept) == sum(each.numel() for each in inputs)


@pytest.mark.usefixtures("without_kernels")
def test_gathered_runs_where_a_table_is_sparse() -> None:
    layout = Layout.dense(1, 64)
    queries, keys, values = random_inputs(layout, 2, 1)
    kv = DenseKV(keys, values)
    assert choose(queries, kv, layout, a_window(64, 2)) == "gathered"
    assert choose(queries, kv, layout, a_window(64, 3)) == "sdpa"
    assert choose(queries, kv, layout, a_window(64, 4, 8)) == "sdpa", "keys copied for 8 queries"
    one = Layout((63,), (64,), 1)
    assert choose(queries[:, :, -1:], kv, one, a_window(1, 2)) == "sdpa", "a single query"
    with_means = dataclasses.replace(a_window(64, 2), means=True)
    refused = [(None, None), (with_means, None), (a_window(64, 2), torch.rand(2))]
    for table, slopes in refused:
        assert choose(queries, kv, layout, table, slopes) == "sdpa"
        with pytest.raises(ConfigError, match="a block table without means"):
            attention(queries, kv, layout, table=table, slopes=slopes, impl="gathered")


@pytest.mark.parametrize("heads,kv_heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_all_blocks_listed_is_dense(heads: int, kv_heads: int, length: int) -> None:
    layout = Layout.dense(2, length)
    queries, keys, values = random_inputs(layout, heads, kv_heads)
    blocks = BlockTable.num_key_blocks(layout, 64)
    table = BlockTable(
        indices=torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks),
        counts=torch.full((1, 1, blocks), blocks, dtype=torch.int32),
        block_size=64,
    )
    table.check(layout, heads, kv_heads)
    kv = DenseKV(keys, values)
    assert_close(attention(queries, kv, layout, table=table), attention(queries, kv, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
def test_pages_in_any_order_read_as_one_tensor(dtype: torch.dtype, shuffled: bool) -> None:
    cache = KVCache.contiguous([KVShape(2, 8, 6)], 2, 40, dtype=dtype, page_size=16)
    if shuffled:
        shuffle(cache)
    keys, values = torch.randn(2, 2, 37, 8).to(dtype), torch.randn(2, 2, 37, 6).to(dtype)
    queries = torch.randn(2, 4, 37, 8).to(dtype)
    expected = attention(queries, DenseKV(keys, values), Layout.dense(2, 37), impl="reference")
    parts = []
    for start, stop in [(0, 20), (20, 36), (36, 37)]:
        layout = cache.place(stop - start)
        cache.layers[0].write(keys[:, :, start:stop], values[:, :, start:stop], layout)
        parts.append(attention(queries[:, :, start:stop], cache.layers[0], layout))
        cache.advance(layout)
    assert_close(torch.cat(parts, dim=2), expected)


def shuffle(cache: KVCache) -> None:
    """Give the rows pages out of order, as a server's allocator would."""
    pages = cache.layers[0].page_table.numel()
    table = torch.randperm(pages).int().view_as(cache.layers[0].page_table)
    import dataclasses

    cache.layers = [
        dataclasses.replace(layer, page_table=table, first_page=None) for layer in cache.layers
    ]


@pytest.mark.parametrize("impl", GENERAL)
def test_a_blind_query_yields_zeros_and_finite_gradients(impl: str) -> None:
    mask = torch.tensor([[False, False, True]])
    queries = torch.randn(1, 2, 3, 4, requires_grad=True)
    keys = torch.randn(1, 2, 3, 4, requires_grad=True)
    layout = Layout.dense(1, 3, mask)
    out = attention(queries, DenseKV(keys, torch.randn(1, 2, 3, 4)), layout, impl=impl)
    out.sum().backward()
    assert torch.equal(out[:, :, :2], torch.zeros(1, 2, 2, 4))
    assert queries.grad is not None and bool(queries.grad.isfinite().all())
    assert keys.grad is not None and bool(keys.grad.isfinite().all())


def test_a_padded_query_behind_cached_ones_is_not_plain_causal() -> None:
    """Two queries and two slots, but the queries sit in slots 1 and 2: found by hypothesis."""
    layout = Layout((1,), (2,), 2)
    queries, keys, values = random_inputs(layout, 1, 1)
    kv = DenseKV(keys, values)
    assert_close(
        attention(queries, kv, layout, impl="sdpa"),
        attention(queries, kv, layout, impl="reference"),
    )


def test_gradcheck_in_float64() -> None:
    layout = Layout.dense(1, 5)
    table = BlockTable(
        indices=torch.tensor([[[[0, 0], [1, 0], [2, 0]]]], dtype=torch.int32),
        counts=torch.tensor([[[1, 2, 2]]], dtype=torch.int32),
        block_size=2,
    )

    def run(queries, keys, values):
        kv = DenseKV(keys, values)
        return attention(queries, kv, layout, table=table, impl="reference")

    shapes = [(1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 3)]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(run, leaves)


def test_bfloat16_stays_near_float32() -> None:
    layout = Layout.dense(1, 100)
    queries, keys, values = random_inputs(layout, 4, 2, 16, 16)
    wide = attention(queries, DenseKV(keys, values), layout)
    narrow = attention(queries.bfloat16(), DenseKV(keys.bfloat16(), values.bfloat16()), layout)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - wide).abs().max()) < 0.05


def test_bad_calls_say_what_is_wrong() -> None:
    layout = Layout.dense(1, 4)
    kv = DenseKV(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))
    with pytest.raises(
        ConfigError,
        match=r"impl of attention must be one of auto, blocked, flex, gathered, reference, sdpa",
    ):
        attention(torch.randn(1, 2, 4, 8), kv, layout, impl="flash")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"multiple of the 2 KV heads"):
        attention(torch.randn(1, 3, 4, 8), kv, layout)
    with pytest.raises(ShapeError, match=r"1 rows and 4 queries"):
        attention(torch.randn(1, 2, 3, 8), kv, layout)


@pytest.mark.parametrize("heads,kv_heads", HEADS)
@pytest.mark.parametrize("length", [1, 63, 128, 129, 300])
def test_blocked_equals_reference_with_gradients(heads: int, kv_heads: int, length: int) -> None:
    layout = Layout.dense(2, length)
    inputs = random_inputs(layout, heads, kv_heads)
    weight = torch.randn(2, heads, length, 6)
    results = []
    for impl in ("reference", "blocked"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = attention(leaves[0], DenseKV(leaves[1], leaves[2]), layout, impl=impl)
        (out * weight).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


def test_blocked_has_the_gradients_of_its_output() -> None:
    layout = Layout.dense(1, 5)
    shapes = [(1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 3)]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(queries, keys, values):
        return attention(queries, DenseKV(keys, values), layout, impl="blocked")

    assert torch.autograd.gradcheck(run, leaves)


def test_blocked_in_bfloat16_is_as_near_as_sdpa() -> None:
    layout = Layout.dense(2, 200)
    queries, keys, values = random_inputs(layout, 6, 2, 64, 64)
    exact = attention(queries, DenseKV(keys, values), layout, impl="reference")
    errors = {}
    for impl in ("sdpa", "blocked"):
        kv = DenseKV(keys.bfloat16(), values.bfloat16())
        found = attention(queries.bfloat16(), kv, layout, impl=impl)
        errors[impl] = float((found.float() - exact).norm() / exact.norm())
    assert errors["blocked"] < 2 * errors["sdpa"]


def test_blocked_is_refused_where_it_does_not_suit() -> None:
    queries, keys, values = random_inputs(Layout.dense(1, 4), 2, 1)
    kv = DenseKV(keys, values)
    others = [
        (Layout.dense(1, 4, torch.tensor([[False, True, True, True]])), None),
        (Layout.dense(1, 4, causal=False), None),
        (Layout.dense(1, 4), torch.rand(2)),
    ]
    for layout, slopes in others:
        with pytest.raises(ConfigError, match="dense and causal"):
            attention(queries, kv, layout, slopes=slopes, impl="blocked")
        assert choose(queries.requires_grad_(), kv, layout, None, slopes) == "sdpa"


def test_blocked_runs_in_training_with_bfloat16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.ops.attention.blocked.computes_bf16", lambda device: True)
    layout = Layout.dense(1, 4)
    queries, keys, values = (each.bfloat16() for each in random_inputs(layout, 2, 1))
    kv = DenseKV(keys, values)
    assert choose(queries, kv, layout) == "sdpa"
    queries.requires_grad_()
    assert choose(queries, kv, layout) == "blocked"
    with torch.no_grad():
        assert choose(queries, kv, layout) == "sdpa"
    assert choose(queries.float(), kv, layout) == "sdpa"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose(queries.float(), kv, layout) == "blocked"
