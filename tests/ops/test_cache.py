"""The paged cache against a list of tokens, under every sequence of operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import CapacityError, ShapeError
from deepseek.ops.attention import KVCache, KVShape, PagedKV
from tests.ops.test_attention import shuffle

SHAPES = [KVShape(2, 3, 2), KVShape(1, 4, 3, values_in_keys=True)]


def append(cache: KVCache, model: list[list[list[torch.Tensor]]], counts: list[int]) -> None:
    """Append random tokens, ragged over the rows, to the cache and to the plain lists."""
    length = max(counts)
    layout = cache.place(length, counts)
    for layer, shape in enumerate(SHAPES):
        keys = torch.randn(cache.num_rows, shape.num_kv_heads, length, shape.key_dim)
        values = torch.randn(cache.num_rows, shape.num_kv_heads, length, shape.value_dim)
        if shape.values_in_keys:
            values = keys[..., : shape.value_dim]
        cache.layers[layer].write(keys, None if shape.values_in_keys else values, layout)
        for row, count in enumerate(counts):
            for token in range(count):
                both = torch.cat((keys[row, :, token], values[row, :, token]), dim=-1)
                model[layer][row].append(both)
    cache.advance(layout)


def check(cache: KVCache, model: list[list[list[torch.Tensor]]]) -> None:
    for layer in range(len(SHAPES)):
        if not any(cache.lengths):
            continue
        keys, values = cache.layers[layer].dense(max(cache.lengths))
        for row, tokens in enumerate(model[layer]):
            assert cache.lengths[row] == len(tokens)
            for slot, both in enumerate(tokens):
                assert torch.equal(torch.cat((keys[row, :, slot], values[row, :, slot]), -1), both)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations_keeps_the_content(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    cache = KVCache.contiguous(SHAPES, rows, 30, dtype=torch.float32, page_size=4)
    if data.draw(st.booleans()):
        shuffle(cache)
    model: list[list[list[torch.Tensor]]] = [[[] for _ in range(rows)] for _ in SHAPES]
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(["append", "truncate", "select"]))
        if step == "append":
            counts = [data.draw(st.integers(0, 6)) for _ in range(cache.num_rows)]
            if max(counts) == 0 or max(cache.lengths) + max(counts) > cache.capacity:
                continue
            append(cache, model, counts)
        elif step == "truncate":
            lengths = [data.draw(st.integers(0, length)) for length in cache.lengths]
            cache.truncate(lengths)
            for layer in model:
                for row, length in enumerate(lengths):
                    del layer[row][length:]
        else:
            every = list(range(cache.num_rows))
            kept = sorted(data.draw(st.sets(st.sampled_from(every), min_size=1)))
            cache = cache.select(kept)
            model = [[layer[row] for row in kept] for layer in model]
        check(cache, model)


def test_a_contiguous_cache_is_read_without_a_copy() -> None:
    cache = KVCache.contiguous([KVShape(2, 4, 4)], 3, 100, dtype=torch.float32)
    keys, values = cache.layers[0].dense(70)
    assert keys.data_ptr() == cache.layers[0].key_pages.data_ptr()
    assert values.data_ptr() == cache.layers[0].value_pages.data_ptr()
    smaller = cache.select([1, 2])
    assert smaller.layers[0].dense(70)[0].data_ptr() == cache.layers[0].key_pages.data_ptr()
    assert cache.capacity == 128 and cache.num_bytes == 2 * 6 * 64 * 2 * 4 * 4


def test_values_that_lie_in_the_keys_are_stored_once() -> None:
    cache = KVCache.contiguous([KVShape(1, 8, 6, True)], 1, 64, dtype=torch.float32)
    assert cache.num_bytes == 64 * 8 * 4


def test_a_failed_pass_leaves_the_content() -> None:
    cache = KVCache.contiguous([KVShape(1, 2, 2)], 2, 8, dtype=torch.float32, page_size=4)
    cache.advance(cache.place(5, [5, 3]))
    with pytest.raises(CapacityError, match=r"at most 8 tokens a row; got 9"):
        cache.place(4)
    cache.place(3)
    assert cache.lengths == [5, 3]


@pytest.mark.parametrize("rows", [[], [1, 0], [0, 0], [2]])
def test_rows_that_cannot_be_selected_are_refused(rows: list[int]) -> None:
    cache = KVCache.contiguous([KVShape(1, 2, 2)], 2, 8, dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"rows of KVCache.select"):
        cache.select(rows)


def test_a_row_cannot_be_truncated_to_more_than_it_has() -> None:
    cache = KVCache.contiguous([KVShape(1, 2, 2)], 1, 8, dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"between 0 and 0"):
        cache.truncate([1])


def test_padding_is_written_nowhere_and_every_layer_has_its_own_table() -> None:
    """Pages behind a row's tokens may be another row's; a fill value in the table is no page."""
    layers = []
    for table in ([[1, 2], [3, 0]], [[5, 4], [2, 0]]):
        keys = torch.full((6, 4, 1, 2), -7.0)
        layers.append(PagedKV(keys, keys.clone(), torch.tensor(table, dtype=torch.int32), None))
    cache = KVCache(layers, [4, 3])
    layout = cache.place(4, [4, 1])
    new = torch.arange(16.0).view(2, 1, 4, 2)
    for layer in layers:
        layer.write(new, new, layout)
    cache.advance(layout)
    for layer, first, second in ((layers[0], 2, 3), (layers[1], 4, 2)):
        written = (layer.key_pages != -7.0).any(-1).any(-1)
        assert written.nonzero().tolist() == sorted(
            [[first, slot] for slot in range(4)] + [[second, 3]]
        )
        assert torch.equal(layer.key_pages[first, :, 0], new[0, 0])
        assert torch.equal(layer.key_pages[second, 3, 0], new[1, 0, 0])


def test_memory_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(CapacityError, match=r"size of KVCache must be small enough for memory"):
        KVCache.contiguous([KVShape(64, 128, 128)], 1, 1 << 30, dtype=torch.float32)
