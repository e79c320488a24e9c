"""The block table refuses what kernels could not execute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepseek.errors import ShapeError
from deepseek.ops.attention import BlockTable, Layout

LAYOUT = Layout.dense(2, 10)


def table(**changes: object) -> BlockTable:
    """A sound table of blocks of 4 for two rows, two KV heads and four heads."""
    good = BlockTable(
        indices=torch.arange(3, dtype=torch.int32).expand(2, 2, 3, 3).contiguous(),
        counts=torch.full((2, 2, 3), 3, dtype=torch.int32),
        block_size=4,
        skip=torch.zeros(2, 4, 3, 3, dtype=torch.bool),
        reach=torch.full((1, 4, 3), 5, dtype=torch.int32),
    )
    return dataclasses.replace(good, **changes)


def test_a_sound_table_passes() -> None:
    table().check(LAYOUT, 4, 2)
    assert table().visible(LAYOUT, 4, 2).shape == (2, 4, 10, 10)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"indices": torch.zeros(2, 3, 3, 3, dtype=torch.int32)}, "indices of BlockTable"),
        ({"counts": torch.zeros(2, 2, 2, dtype=torch.int32)}, "counts of BlockTable"),
        ({"counts": torch.full((2, 2, 3), 4, dtype=torch.int32)}, "between 0 and 3"),
        ({"indices": torch.full((2, 2, 3, 3), 3, dtype=torch.int32)}, "between 0 and 2"),
        ({"indices": torch.zeros(2, 2, 3, 3, dtype=torch.int32)}, "listed once"),
        ({"skip": torch.zeros(2, 2, 3, 3, dtype=torch.bool)}, "skip of BlockTable"),
        ({"reach": torch.zeros(2, 3, 3, dtype=torch.int32)}, "reach of BlockTable"),
    ],
)
def test_an_unsound_table_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        table(**changes).check(LAYOUT, 4, 2)


def test_entries_past_the_count_do_not_matter() -> None:
    good = table(counts=torch.full((2, 2, 3), 2, dtype=torch.int32))
    other = dataclasses.replace(good, indices=good.indices.clone(), memo={})
    other.indices[..., 2] = 99
    other.check(LAYOUT, 4, 2)
    assert torch.equal(good.visible(LAYOUT, 4, 2), other.visible(LAYOUT, 4, 2))


def test_a_decoded_token_is_a_query_block_of_its_own() -> None:
    layout = Layout((130, 63), (131, 64), 1)
    assert BlockTable.num_query_blocks(layout, 64) == 1
    assert BlockTable.num_key_blocks(layout, 64) == 3
    last_block = BlockTable(
        indices=torch.tensor([[[[2]]], [[[0]]]], dtype=torch.int32),
        counts=torch.ones(2, 1, 1, dtype=torch.int32),
        block_size=64,
    )
    seen = last_block.visible(layout, 2, 1)
    assert seen[0, 0, 0].nonzero().flatten().tolist() == [128, 129, 130]
    assert int(seen[1, 0, 0].sum()) == 64
