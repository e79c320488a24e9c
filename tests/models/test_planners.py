"""The planner seam with toy planners, the window, ALiBi, and contexts past one block."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from deepseek.errors import ConfigError, ShapeError
from deepseek.models import Decoder, WindowPlanner
from deepseek.models.positions import alibi_slopes
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV
from tests.models.zoo import CASES, TINY, ours, randomize, reference
from tests.tolerances import assert_logits_equal


@dataclasses.dataclass
class EveryBlock:
    """A toy planner: lists every key block for every query block."""

    block_size: int = 16
    calls: int = 0

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable:
        self.calls += 1
        blocks = BlockTable.num_key_blocks(layout, self.block_size)
        query_blocks = BlockTable.num_query_blocks(layout, self.block_size)
        kv_heads = kv.dense(layout.num_slots)[0].shape[1]
        shape = (layout.num_rows, kv_heads, query_blocks)
        table = BlockTable(
            indices=torch.arange(blocks, dtype=torch.int32).expand(*shape, blocks),
            counts=torch.full(shape, blocks, dtype=torch.int32),
            block_size=self.block_size,
        )
        table.check(layout, queries.shape[1], kv_heads)
        return table


class BestKeyBlock(EveryBlock):
    """A toy routed planner: own block, first block, and the block whose mean key scores best."""

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable:
        keys, _ = kv.dense(layout.num_slots)
        size = self.block_size
        own = layout.query_slots(keys.device) // size
        per_query = []
        for row in range(layout.num_rows):
            blocks = range(int(own[row, 0]), int(own[row, -1]) + 1)
            for block in blocks:
                means = [keys[row, :, b * size : (b + 1) * size].mean(1) for b in range(block + 1)]
                scores = torch.stack(means, 1).norm(dim=-1)
                best = scores.argmax(-1)
                per_query.append(torch.stack([torch.full_like(best, block), best * 0, best], -1))
        listed = torch.stack(per_query).view(layout.num_rows, -1, keys.shape[1], 3).transpose(1, 2)
        listed = listed.sort(-1, descending=True).values
        unique = torch.ones_like(listed, dtype=torch.bool)
        unique[..., 1:] = listed[..., 1:] != listed[..., :-1]
        order = (~unique).int().sort(dim=-1, stable=True).indices
        table = BlockTable(listed.gather(-1, order).int(), unique.sum(-1).int(), size)
        table.check(layout, queries.shape[1], keys.shape[1])
        return table


@pytest.mark.parametrize("case", [case for case in CASES if "window" not in case])
def test_a_table_of_every_block_changes_nothing(case: str) -> None:
    model = ours(reference(case))
    tokens = torch.randint(0, 97, (2, 70))
    with torch.no_grad():
        expected = model(tokens).logits
        model.planner = EveryBlock()
        assert_logits_equal(model(tokens).logits, expected)
        cache = model.new_cache(2, 70)
        parts = [model(tokens[:, :65], cache=cache).logits]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(65, 70)]
    assert_logits_equal(torch.cat(parts, 1), expected)
    assert model.planner.calls == 3 * 7


def test_a_routed_planner_decodes_as_it_prefills() -> None:
    """Selection from complete past blocks and the own one: the same step by step and at once."""
    model = Decoder(TINY, planner=BestKeyBlock(block_size=8), impl="reference").eval()
    randomize(model)
    tokens = torch.randint(0, 50, (1, 40))
    with torch.no_grad():
        dense = Decoder(TINY)
        dense.load_state_dict(model.state_dict())
        assert float((dense(tokens).logits - model(tokens).logits).abs().max()) > 1e-3
        for impl in ("reference", "sdpa"):
            model.impl = impl
            cache = model.new_cache(1, 40)
            chunks = [model(tokens[:, at : at + 8], cache=cache).logits for at in range(0, 40, 8)]
            assert_logits_equal(torch.cat(chunks, 1), model(tokens).logits)


@pytest.mark.parametrize("window", [1, 7, 64, 65, 100])
@pytest.mark.parametrize("block_size", [16, 64])
def test_the_window_equals_transformers(window: int, block_size: int) -> None:
    theirs = reference("mistral-window", sliding_window=window)
    model = ours(theirs)
    model.planner = WindowPlanner(window, (0, 1, 2), block_size)
    tokens = torch.randint(0, 97, (2, 150))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert_logits_equal(model(tokens).logits, expected)
        cache = model.new_cache(2, 150)
        parts = [model(tokens[:, :80], cache=cache).logits]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(80, 150)]
    assert_logits_equal(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("heads", [1, 4, 6, 9, 16])
def test_alibi_slopes_and_bias_equal_bloom(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32)[:, 0]
    slopes = torch.tensor(alibi_slopes(heads))
    torch.testing.assert_close(slopes[:, None] * torch.arange(5), theirs)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_alibi_decodes_as_it_prefills_with_padding(impl: str) -> None:
    model = Decoder(TINY.replace(positions="alibi", family="deepseek_stack"), impl=impl).eval()
    randomize(model)
    tokens = torch.randint(0, 50, (1, 70))
    padded = torch.cat((torch.zeros(1, 9, dtype=torch.long), tokens), 1)
    mask = torch.cat((torch.zeros(1, 9), torch.ones(1, 70)), 1)
    with torch.no_grad():
        expected = model(tokens).logits
        assert_logits_equal(model(padded, mask).logits[:, 9:], expected)
        cache = model.new_cache(1, 70)
        parts = [model(tokens[:, :60], cache=cache).logits]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(60, 70)]
    assert_logits_equal(torch.cat(parts, 1), expected)
    rope = Decoder(TINY).eval()
    rope.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert float((rope(tokens).logits - expected).abs().max()) > 1e-3


def test_bad_inputs_are_refused() -> None:
    model = Decoder(TINY)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"given, and not both"):
        model()
    with pytest.raises(ShapeError, match=r"rows, tokens"):
        model(tokens[0])
    with pytest.raises(ShapeError, match=r"attention_mask of Decoder must be of shape"):
        model(tokens, torch.ones(2, 4))
    left = torch.tensor([[0, 1, 1, 1, 1]] * 2)
    with pytest.raises(ShapeError, match=r"padded on the right when there is a cache"):
        model(tokens, left, cache=model.new_cache(2, 8))
    with pytest.raises(ShapeError, match=r"one count for each of the 3 rows"):
        model(tokens, torch.ones(2, 5), cache=model.new_cache(3, 8))
    with pytest.raises(ConfigError, match=r"window of DecoderConfig must be at least 1"):
        TINY.replace(window=0)


def test_positions_and_labels_that_do_not_fit_are_refused() -> None:
    model = Decoder(TINY)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    for positions in (torch.zeros(5), torch.zeros(1, 1), torch.zeros(2, 4)):
        with pytest.raises(ShapeError, match=r"position_ids of Decoder must be of shape"):
            model(tokens, position_ids=positions.long())
    with pytest.raises(ShapeError, match=r"labels of Decoder"):
        model(tokens, labels=tokens, last_only=True)
    alibi = Decoder(TINY.replace(positions="alibi"))
    with pytest.raises(ShapeError, match=r"None with ALiBi"):
        alibi(tokens, position_ids=tokens)


def test_masks_do_not_outlive_their_pass() -> None:
    import gc
    import weakref

    model = Decoder(TINY.replace(window=3, window_layers=(0, 1))).eval()
    layouts: list[weakref.ref[Layout]] = []
    place = model._place

    def watched(*args: object) -> object:
        layout, counts = place(*args)  # type: ignore[arg-type]
        layouts.append(weakref.ref(layout))
        return layout, counts

    model._place = watched  # type: ignore[method-assign, assignment]
    gc.disable()
    try:
        with torch.no_grad():
            for _ in range(3):
                model(torch.zeros(2, 9, dtype=torch.long), torch.tensor([[0] * 4 + [1] * 5] * 2))
    finally:
        gc.enable()
    assert [ref() for ref in layouts] == [None] * 3
