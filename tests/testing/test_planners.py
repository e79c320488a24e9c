"""The contract of a planner: ours hold it, and every planted fault is caught."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from deepseek.errors import VerifyError
from deepseek.models import Pattern, RoutedPlanner, StaticPlanner, WindowPlanner
from deepseek.models.config import DecoderConfig
from deepseek.models.planner import window_table
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV
from deepseek.testing import check_planner
from tests.models.test_planners import BestKeyBlock, EveryBlock
from tests.models.test_routed import ALL, FEW, SHAPE, WORTH

CONFIG: DecoderConfig = SHAPE.replace(head_dim=64, hidden_size=256)
SPARSE = Pattern(recent=2, every=4, sparsity=0.7, block_size=16)
OURS = {
    "window": (WindowPlanner(40, (0,)), WindowPlanner(400, (0,))),
    "window of small blocks": (WindowPlanner(70, (0,), 16), WindowPlanner(400, (0,), 16)),
    "static": (StaticPlanner(SPARSE), StaticPlanner(SPARSE.replace(sparsity=0.0))),
    "static, every block": (
        StaticPlanner(SPARSE.replace(sparsity=1.0)),
        StaticPlanner(Pattern(sparsity=0.0)),
    ),
    "routed": (RoutedPlanner(CONFIG, FEW), RoutedPlanner(CONFIG, ALL)),
    "routed by worth": (RoutedPlanner(CONFIG, WORTH), RoutedPlanner(CONFIG, ALL)),
    "routed without means": (
        RoutedPlanner(CONFIG, dataclasses.replace(FEW, means=False)),
        RoutedPlanner(CONFIG, ALL),
    ),
    "every block": (EveryBlock(), EveryBlock(64)),
}


@pytest.mark.parametrize("name", OURS)
def test_our_planners_hold_it(name: str) -> None:
    planner, full = OURS[name]
    proof = check_planner(planner, full)
    assert proof.largest_error < 1e-5
    assert (proof.share_seen == 1) == (name == "every block")


class Window:
    """A window of 40 tokens, with a place for one fault."""

    window = 40

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        """Return the table, changed."""
        return self.changed(window_table(layout, self.window, 16, queries.device), queries, layout)

    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        """Return the table."""
        return table


class Twice(Window):
    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        return dataclasses.replace(table, indices=table.indices.clone().fill_(0), memo={})


class Outside(Window):
    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        return dataclasses.replace(table, indices=table.indices + 1, memo={})


class ByLength(Window):
    """What is seen depends on how long the text has become."""

    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        reach = torch.full((1, 1, 1), 20 + layout.num_slots % 7, dtype=torch.int32)
        return dataclasses.replace(table, reach=reach, memo={})


class ByPart(Window):
    """Blocks are counted from the first query of a pass."""

    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        shift = torch.zeros_like(table.counts)
        shift[..., 0] = 1
        fewer = (table.counts - shift).clamp(min=1)
        return dataclasses.replace(table, counts=fewer, memo={})


class RowsAlike(Window):
    """What row 0 sees is taken for all."""

    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        return dataclasses.replace(
            table, indices=table.indices[:1], counts=table.counts[:1], memo={}
        )


class ByTheLast(Window):
    """Looks ahead: the last query of the pass decides."""

    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        far = int(queries[0, 0, -1, 0] > 0) * 20 + 10
        reach = torch.full((1, 1, 1), far, dtype=torch.int32)
        return dataclasses.replace(table, reach=reach, memo={})


class Writes(Window):
    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        queries.data.mul_(2)
        return table


class Lists(Window):
    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        return table.indices.tolist()


class Raises(Window):
    def changed(self, table: BlockTable, queries: Tensor, layout: Layout) -> BlockTable:
        raise KeyError("layer")


FAULTS = {
    BestKeyBlock: "outputs up to slot",  # the mean of a block holds its later keys
    ByLength: "outputs of slots",
    ByPart: "outputs of slots",
    ByTheLast: "outputs up to slot",
    Lists: "plan of Lists must be a BlockTable or None",
    Outside: "table of Outside must be one that fits its layout",
    Raises: "plan of Raises must be made without an error",
    RowsAlike: "in one batch of RowsAlike",
    Twice: "listed once",
    Writes: "queries, keys and values of Writes must be left as they were",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault: type[Window]) -> None:
    with pytest.raises(VerifyError) as caught:
        check_planner(fault(), EveryBlock())
    assert FAULTS[fault] in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_without_a_fault_holds_it() -> None:
    """So that what is caught above are the faults."""
    assert check_planner(Window(), EveryBlock()).largest_error < 1e-5


def test_a_budget_that_is_not_full_is_caught() -> None:
    with pytest.raises(VerifyError, match="outputs with a full budget of Window"):
        check_planner(Window(), WindowPlanner(399, (0,)))
