"""FlexAttention over block tables: eagerly on a CPU against the reference, its lists against the
table, and compiled where there is a GPU."""

from __future__ import annotations

import dataclasses
import types
import warnings

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from deepseek.errors import BackendError, ConfigError
from deepseek.ops.attention import BlockTable, DenseKV, Layout, attention, choose, gpu
from deepseek.testing import check_attention
from tests.ops.strategies import layouts, tables
from tests.ops.test_attention import BLOCKS, HEADS, a_window, random_inputs
from tests.ops.test_merging import drawn_weights, results_of
from tests.tolerances import assert_close

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def without_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run FlexAttention's eager mathematics directly: tracing it takes longer than computing."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def backward_on_a_cpu(without_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift PyTorch's refusal of gradients on a CPU: its eager mathematics has them."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)


def run_flex(layout: Layout, table: BlockTable, slopes: torch.Tensor | None, impl: str):
    return lambda queries, keys, values: attention(
        queries,
        DenseKV(keys, values),
        layout,
        table=table,
        slopes=slopes,
        impl=impl,
        return_lse=True,
    )


@pytest.mark.usefixtures("without_dynamo")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_flex_equals_reference(data: st.DataObject) -> None:
    layout = data.draw(st.one_of(layouts(), layouts(longest=150)))
    heads, kv_heads = data.draw(st.sampled_from([*HEADS, (4, 1)]))
    blocks = (1, 3, 4) if layout.num_slots < 20 else BLOCKS
    table = data.draw(tables(layout, heads, kv_heads, blocks, means=False))
    slopes = data.draw(st.sampled_from([None, torch.rand(heads)]))
    inputs = random_inputs(layout, heads, kv_heads)
    (expected, right), (found, lse) = (
        run_flex(layout, table, slopes, impl)(*inputs) for impl in ("reference", "flex")
    )
    assert_close(found, expected)
    torch.testing.assert_close(lse, right, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_dynamo")
def test_alibi_counts_from_where_a_row_goes_on() -> None:
    """A constant of all scores of a query is seen in the log-sum-exp alone."""
    layout = Layout((5, 20), (9, 24), 4)
    inputs, slopes = random_inputs(layout, 2, 1), torch.tensor([0.5, 1.0])
    table = BlockTable(torch.tensor([[[[0, 1]]]]).int(), torch.tensor([[[2]]]).int(), 16)
    table.check(layout, 2, 1)
    expected, found = (
        run_flex(layout, table, slopes, impl)(*inputs) for impl in ("reference", "flex")
    )
    for one, other in zip(expected, found, strict=True):
        assert_close(other, one)


@pytest.mark.usefixtures("backward_on_a_cpu")
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_flex_has_the_references_gradients(data: st.DataObject) -> None:
    layout = data.draw(layouts(longest=30))
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(tables(layout, heads, kv_heads, means=False))
    slopes = data.draw(st.sampled_from([None, torch.rand(heads)]))
    inputs = random_inputs(layout, heads, kv_heads)
    weights = drawn_weights(inputs)
    found = (
        results_of(run_flex(layout, table, slopes, impl), inputs, *weights)
        for impl in ("reference", "flex")
    )
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_lists_hold_what_the_mask_shows(data: st.DataObject) -> None:
    """A kernel goes through the lists, for the backward pass through those of the key blocks, and
    asks the mask inside of them: what the eager execution, which reads no lists, cannot tell."""
    layout = data.draw(layouts(longest=150))
    heads, kv_heads = data.draw(st.sampled_from(HEADS))
    table = data.draw(tables(layout, heads, kv_heads, (4, 16, 48, 64, 128), means=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "LISTED", data.draw(st.sampled_from([16, 128])))
        mask = gpu.block_mask(table, layout, heads, kv_heads)
    assert mask.q_num_blocks is not None and mask.q_indices is not None
    forward = dense_lists(mask.kv_num_blocks, mask.kv_indices)
    backward = dense_lists(mask.q_num_blocks, mask.q_indices).transpose(-1, -2)
    assert torch.equal(forward, backward)
    wanted = table.visible(layout, heads, kv_heads)
    wanted = wanted.expand(layout.num_rows, heads, -1, -1)
    for shown in (asked(mask, layout, heads), asked(mask, layout, heads) & by_token(forward, mask)):
        assert torch.equal(shown, wanted)


def dense_lists(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return bool [rows, heads, lists, width]: which blocks a kernel visits."""
    held = torch.arange(indices.shape[-1]) < counts[..., None]
    visited = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool)
    visited.scatter_(-1, torch.where(held, indices, indices.shape[-1]).long(), True)
    return visited[..., :-1]


def asked(mask: BlockMask, layout: Layout, heads: int) -> torch.Tensor:
    """Return what the mask says of every query and slot."""
    sizes = (layout.num_rows, heads, *mask.seq_lengths)
    places = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return mask.mask_mod(*places)


def by_token(lists: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Return lists of blocks as lists of queries and slots."""
    of_queries, of_keys = mask.BLOCK_SIZE
    wide = lists.repeat_interleave(of_queries, 2).repeat_interleave(of_keys, 3)
    return wide[:, :, : mask.seq_lengths[0], : mask.seq_lengths[1]]


def test_lists_are_as_short_as_their_blocks_allow() -> None:
    """A window of 128 slots, in blocks of 64, over 512: 1 block of 128, then 2."""
    layout = Layout.dense(1, 512)
    mask = gpu.block_mask(a_window(512, 2, 64), layout, 4, 2)
    assert mask.kv_num_blocks.tolist() == [[[1, 2, 2, 2]]]
    assert mask.kv_indices[0, 0, 3, :2].tolist() == [2, 3]


def test_what_it_does_not_run_is_refused_with_a_reason() -> None:
    layout, table = Layout.dense(1, 32), a_window(32, 1)
    queries, keys, values = random_inputs(layout, 2, 1)
    kv = DenseKV(keys, values)
    refused = [(None, "no table"), (dataclasses.replace(table, means=True), "a table with means")]
    for each, why in refused:
        with pytest.raises(ConfigError, match=f"the flex execution runs; got '{why}'"):
            attention(queries, kv, layout, table=each, impl="flex")
    with pytest.raises(BackendError, match=r"must be a GPU, or a CPU without gradients"):
        attention(queries.requires_grad_(), kv, layout, table=table, impl="flex")


def on_a_gpu(queries: torch.Tensor) -> torch.Tensor:
    """Return what the choice looks at of a tensor on a GPU."""
    about = {name: getattr(queries, name) for name in ("shape", "dtype")}
    return types.SimpleNamespace(device=torch.device("cuda"), **about)  # type: ignore[return-value]


def test_auto_takes_it_on_a_gpu_for_tables_it_runs() -> None:
    layout, table = Layout.dense(1, 64), a_window(64, 4)
    queries, keys, values = random_inputs(layout, 2, 1, 16, 16)
    kv, there = DenseKV(keys, values), on_a_gpu(queries)
    assert choose(queries, kv, layout, table) != "flex"
    assert choose(there, kv, layout, table) == "flex"
    assert choose(there, kv, layout, table, torch.rand(2), return_lse=True) == "flex"
    assert choose(on_a_gpu(queries.double()), kv, layout, table) == "sdpa"
    assert choose(there, kv, layout, dataclasses.replace(table, means=True)) == "sdpa"
    thin = DenseKV(keys, values[..., :8])
    assert choose(there, thin, layout, table) == "sdpa", "8 channels"
    one = Layout((63,), (64,), 1)
    assert choose(on_a_gpu(queries[:, :, -1:]), kv, one, a_window(1, 1)) == "sdpa", "one query"


def test_layers_of_a_pass_share_lists() -> None:
    layout, table = Layout.dense(1, 64), a_window(64, 2)
    queries, keys, values = random_inputs(layout, 2, 1)
    run_flex(layout, table, None, "flex")(queries, keys, values)
    (made, _) = table.memo["flex", 2, 1]
    run_flex(layout, table, None, "flex")(queries, keys, values)
    assert table.memo["flex", 2, 1][0] is made


@pytest.mark.slow
def test_compiled_on_a_cpu_it_reads_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's compiled kernel for CPUs goes through the lists, as those of a GPU do."""
    compiled = torch.compile(flex_module.flex_attention, fullgraph=True)

    def run(*tensors, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compiled(*tensors, **settings)

    monkeypatch.setattr(gpu, "_eager", run)
    layout, table = Layout.dense(1, 512), a_window(512, 4, 64)
    queries, keys, values = random_inputs(layout, 4, 2, 16, 16)

    def found(impl: str) -> torch.Tensor:
        kv = DenseKV(keys, values)
        return attention(queries, kv, layout, table=table, impl=impl)  # type: ignore[call-overload]

    assert_close(found("flex"), found("reference"))
    mask = gpu.block_mask(table, layout, 4, 2)
    mask.kv_num_blocks.clamp_(max=1)
    table.memo["flex", 4, 2] = (mask, table.memo["flex", 4, 2][1])
    assert float((found("flex") - found("reference")).abs().max()) > 0.01


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_holds_the_contract(dtype: torch.dtype) -> None:
    """Outputs, log-sum-exp and gradients, blocks of 16 to 128; never run by us."""
    proof = check_attention(gpu.attention_flex, device="cuda", dtype=dtype)
    assert len(proof.served) == 40 and proof.has_lse, proof


@NEEDS_CUDA
@pytest.mark.gpu
def test_on_a_gpu_a_long_window_equals_a_mask() -> None:
    """4096 tokens by "auto", which takes FlexAttention, and by SDPA with a mask."""
    layout = Layout.dense(1, 4096)
    own = torch.arange(64, dtype=torch.int32, device="cuda")
    listed = (own[:, None] - torch.arange(8, dtype=torch.int32, device="cuda")).clamp(min=0)
    table = BlockTable(listed[None, None], (own + 1).clamp(max=8)[None, None], 64)
    shapes = ((1, 8, 4096, 64), (1, 2, 4096, 64), (1, 2, 4096, 64))
    results = []
    for impl in ("auto", "sdpa"):
        torch.manual_seed(0)
        leaves = [
            torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for shape in shapes
        ]
        kv = DenseKV(*leaves[1:])
        assert impl != "auto" or choose(leaves[0], kv, layout, table) == "flex"
        out = attention(leaves[0], kv, layout, table=table, impl=impl)
        out.float().square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert float(error) < 0.02
