"""Attention by our kernels with gradients: every instruction set against the reference."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.errors import ConfigError, ShapeError
from deepseek.ops.attention import (
    AttentionImpl,
    BlockTable,
    DenseKV,
    Layout,
    attention,
    choose,
    tiled,
)
from deepseek.ops.cpu import ISA_VARIABLE
from deepseek.testing import check_attention
from tests.ops.native import BEST, ISAS, NEEDS_KERNELS
from tests.ops.strategies import layouts, tables

pytestmark = NEEDS_KERNELS
DTYPES = [torch.float32, torch.bfloat16]
BLOCKS = (16, 24, 32, 64, 128)


def with_gradients(
    impl: AttentionImpl, inputs: list[Tensor], layout: Layout, weight: Tensor, **asked: object
) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = attention(leaves[0], DenseKV(*leaves[1:]), layout, impl=impl, **asked)  # type: ignore
    (out.float() * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def drawn(
    layout: Layout, heads: int, kv_heads: int, dim: int = 64, value_dim: int = 64
) -> list[Tensor]:
    rows, shapes = layout.num_rows, ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    lengths = (layout.num_queries, layout.num_slots, layout.num_slots)
    return [
        torch.randn(rows, count, length, width)
        for (count, width), length in zip(shapes, lengths, strict=True)
    ]


def assert_near(found: list[Tensor], wanted: list[Tensor], bound: float = 1e-4) -> None:
    for one, other in zip(found, wanted, strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm().clamp(min=1)
        assert float(error) < bound


# Two sets differ from others in integer products alone.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa not in ("avxvnni", "vnni")])
def test_every_instruction_set_holds_the_contract(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    proof = check_attention(tiled.attention_tiled, dtype=dtype)
    assert len(proof.served) == 48 and proof.has_lse and proof.largest_error < 0.5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tables_of_real_blocks_equal_the_reference(data: st.DataObject) -> None:
    """Blocks of 16 to 128, ragged lists, rows of different lengths, means, a bias, any threads."""
    layout = data.draw(layouts(longest=300))
    heads, kv_heads = data.draw(st.sampled_from([(2, 2), (6, 2), (4, 1)]))
    table = data.draw(st.one_of(st.none(), tables(layout, heads, kv_heads, BLOCKS)))
    slopes = data.draw(st.sampled_from([None, torch.rand(heads)]))
    dim, value_dim = data.draw(st.sampled_from([(64, 64), (80, 48), (6, 3)]))
    inputs = drawn(layout, heads, kv_heads, dim, value_dim)
    weight = torch.randn(*inputs[0].shape[:-1], value_dim)
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    try:
        found = with_gradients("tiled", inputs, layout, weight, table=table, slopes=slopes)
    finally:
        torch.set_num_threads(threads)
    wanted = with_gradients("reference", inputs, layout, weight, table=table, slopes=slopes)
    assert_near(found, wanted)


def chosen_by_each_token(layout: Layout, kv_heads: int) -> BlockTable:
    """A list of its own for every token: its own block, the first, and one between, with means."""
    length, generator = layout.num_slots, torch.Generator().manual_seed(0)
    own = torch.arange(length) // 64
    between = (torch.rand(kv_heads, length, generator=generator) * own).int()
    lists = torch.stack([own.int().expand(kv_heads, -1), between], -1)
    counts = torch.where(between == own, 1, 2)
    return BlockTable(lists[None], counts.int()[None], 64, query_block=1, means=True)


def test_queries_behind_the_last_block_of_a_short_row() -> None:
    """They are no tokens; there is no mean of a block that is not there."""
    layout = Layout((15,), (16,), 18)
    lists = torch.zeros(1, 1, 3, 1, dtype=torch.int32)
    table = BlockTable(lists, torch.tensor([[[0, 1, 1]]], dtype=torch.int32), 16, means=True)
    inputs, weight = drawn(layout, 2, 2), torch.randn(1, 2, 18, 64)
    found = with_gradients("tiled", inputs, layout, weight, table=table)
    assert_near(found, with_gradients("reference", inputs, layout, weight, table=table))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("plain", "amx_emulated", BEST)])
def test_a_list_for_every_token(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    layout = Layout.dense(2, 700)
    inputs = [each.to(dtype) for each in drawn(layout, 6, 2)]
    table, weight = chosen_by_each_token(layout, 2), torch.randn(2, 6, 700, 64)
    found = with_gradients("tiled", inputs, layout, weight, table=table)
    wide = [each.float() for each in inputs]
    wanted = with_gradients("reference", wide, layout, weight, table=table)
    assert_near(found, wanted, 1e-4 if dtype == torch.float32 else 1e-2)


def test_bfloat16_is_as_near_as_sdpa() -> None:
    layout = Layout.dense(2, 200)
    inputs, weight = drawn(layout, 6, 2), torch.randn(2, 6, 200, 64)
    narrow = [each.bfloat16() for each in inputs]
    exact = with_gradients("reference", inputs, layout, weight)
    ours = with_gradients("tiled", narrow, layout, weight)
    theirs = with_gradients("sdpa", narrow, layout, weight)
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert (one.float() - right).norm() < 2 * (other.float() - right).norm()


def test_large_scores_do_not_overflow() -> None:
    layout = Layout.dense(1, 200)
    inputs, weight = drawn(layout, 2, 1), torch.randn(1, 2, 200, 64)
    inputs[0] *= 1e4
    found = with_gradients("tiled", inputs, layout, weight)
    assert all(bool(each.isfinite().all()) for each in found)
    assert_near(found[:1], with_gradients("reference", inputs, layout, weight)[:1], 1e-4)


def test_the_same_bits_every_time_and_from_several_callers_at_once() -> None:
    layout = Layout.dense(1, 600)
    inputs, weight = drawn(layout, 6, 2), torch.randn(1, 6, 600, 64)
    table = chosen_by_each_token(layout, 2)
    wanted = with_gradients("tiled", inputs, layout, weight, table=table)
    found: list[list[Tensor]] = []

    def run() -> None:
        found.append(with_gradients("tiled", inputs, layout, weight, table=table))

    callers = [threading.Thread(target=run) for _ in range(3)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert len(found) == 3
    for results in found:
        assert all(torch.equal(one, other) for one, other in zip(results, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whatever_the_threads_and_companions(dtype: torch.dtype) -> None:
    layout, threads = Layout.dense(3, 600), torch.get_num_threads()
    inputs = [each.to(dtype) for each in drawn(layout, 6, 2)]
    weight, table = torch.randn(3, 6, 600, 64), chosen_by_each_token(layout, 2)
    wanted = with_gradients("tiled", inputs, layout, weight, table=table)
    try:
        for count in (1, 2, 3, 5, 8):
            torch.set_num_threads(count)
            found = with_gradients("tiled", inputs, layout, weight, table=table)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)
    alone = [each[1:2].clone() for each in inputs]
    found = with_gradients("tiled", alone, Layout.dense(1, 600), weight[1:2], table=table)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other[1:2])


def test_what_is_kept_grows_with_the_text_alone() -> None:
    layout = Layout.dense(1, 320)
    inputs = [each.requires_grad_() for each in drawn(layout, 4, 2)]
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(inputs[0], DenseKV(*inputs[1:]), layout, impl="tiled")
    inputs_and_output = sum(each.numel() for each in inputs) + inputs[0].numel()
    assert sum(kept) == inputs_and_output + 4 * 320


def test_autocast_computes_in_bfloat16_and_returns_what_it_got() -> None:
    layout = Layout.dense(1, 150)
    inputs = drawn(layout, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(inputs[0], DenseKV(*inputs[1:]), layout, impl="tiled")
    narrow = [each.bfloat16() for each in inputs]
    wanted = attention(narrow[0], DenseKV(*narrow[1:]), layout, impl="tiled")
    assert found.dtype == torch.float32 and torch.equal(found, wanted.float())


def test_nothing_asked_is_nothing_found() -> None:
    layout = Layout((5,), (5,), 0)
    inputs = [torch.randn(1, 2, length, 8) for length in (0, 5, 5)]
    found = with_gradients("tiled", inputs, layout, torch.zeros(1, 2, 0, 8))
    assert found[0].shape == (1, 2, 0, 8) and not found[1].numel()
    assert not found[2].any() and not found[3].any()


@pytest.mark.parametrize(
    ("blocks", "count", "says"),
    [
        ([0, 0], 2, "twice"),
        ([0, 3], 2, "not there"),
        ([0, -1], 2, "not there"),
        ([0, 1], 3, "room"),
    ],
)
def test_a_wrong_list_is_refused(blocks: list[int], count: int, says: str) -> None:
    lists = torch.tensor(blocks, dtype=torch.int32).expand(1, 1, 3, 2)
    table = BlockTable(lists, torch.full((1, 1, 3), count, dtype=torch.int32), 64)
    layout = Layout.dense(1, 150)
    queries, keys, values = drawn(layout, 2, 1)
    with pytest.raises(ShapeError, match=says):
        attention(queries, DenseKV(keys, values), layout, table=table, impl="tiled")
    second_is_wrong = torch.stack([torch.tensor([[0, 1]]).int().expand(1, 3, 2), lists[0]])
    good = torch.full((1, 1, 3), 2, dtype=torch.int32)
    if says != "room":
        both = dataclasses.replace(table, indices=second_is_wrong, counts=good)
        asked, *past = (each.expand(2, -1, -1, -1) for each in (queries, keys, values))
        with pytest.raises(ShapeError, match=says):
            attention(asked, DenseKV(*past), Layout.dense(2, 150), table=both, impl="tiled")
    short = dataclasses.replace(table, indices=lists[:, :, :2], counts=table.counts[:, :, :2])
    with pytest.raises(ShapeError, match=r"indices of BlockTable must be of shape \[1, 1, 3, 2\]"):
        attention(queries, DenseKV(keys, values), layout, table=short, impl="tiled")


def test_when_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.dense(1, 128)
    inputs = [each.bfloat16().requires_grad_() for each in drawn(layout, 2, 1)]
    queries, kv = inputs[0], DenseKV(*inputs[1:])
    table = dataclasses.replace(chosen_by_each_token(layout, 1), means=False)
    assert choose(queries, kv, layout, table) == "tiled"
    assert choose(queries, kv, layout, return_lse=True) == "tiled"
    assert choose(queries.double(), kv, layout, table) == "sdpa", "another dtype"
    assert choose(queries[:, :, :63], kv, Layout((65,), (128,), 63), table) == "sdpa", "too few"
    monkeypatch.setattr(tiled, "chosen_instruction_set", lambda: "amx")
    assert choose(queries, kv, layout) == "tiled"
    with torch.no_grad():
        assert choose(queries, kv, layout) == "sdpa"
    monkeypatch.setattr(tiled, "chosen_instruction_set", lambda: "avx512")
    assert choose(queries, kv, layout) != "tiled"
    monkeypatch.setattr(tiled, "why_missing", lambda: "no compiler")
    assert choose(queries, kv, layout, table) == "sdpa"
    with pytest.raises(ConfigError, match="tiled: no compiler"):
        attention(queries, kv, layout, table=table, impl="tiled")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    layout = Layout.dense(1, 4)
    queries, keys, values = (each.to(dtype) for each in drawn(layout, 2, 1))
    with pytest.raises(ConfigError, match="float32 and bfloat16, not in torch"):
        attention(queries, DenseKV(keys, values), layout, impl="tiled")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("plain", "amx_emulated", BEST)])
def test_the_largest_scores_of_blocks(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, :70] = False
    layout = Layout((110, 110), (300, 250), 190, mask)
    queries, keys, _ = (each.to(dtype) for each in drawn(layout, 6, 2, 32))
    found = tiled.block_peaks(queries, keys, layout, 0.5)
    scores = 0.5 * queries.float() @ keys.float().repeat_interleave(3, 1).transpose(-1, -2)
    scores = scores.masked_fill(~layout.visible(torch.device("cpu"))[:, None], -torch.inf)
    padded = torch.nn.functional.pad(scores, (0, 20), value=-torch.inf)
    wanted = padded.unflatten(-1, (5, 64)).amax(-1)
    assert torch.equal(found.isinf(), wanted.isinf()) and bool(wanted.isinf().any())
    torch.testing.assert_close(found, wanted)
