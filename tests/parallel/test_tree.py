"""Sums in one order: who adds does not show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.parallel import TreeSum, World, pairwise_sum


def leaves(count: int) -> list[list[Tensor]]:
    torch.manual_seed(count)
    scale = 10.0 ** torch.randint(-6, 6, (count, 5, 1))
    return [[part, 2 * part[:2]] for part in torch.randn(count, 5, 3) * scale]


def tree(parts: list[list[Tensor]]) -> list[Tensor]:
    """Return the sum by the definition: halves at the largest power of two below the count."""
    if len(parts) == 1:
        return [part.clone() for part in parts[0]]
    half = 1 << ((len(parts) - 1).bit_length() - 1)
    pairs = zip(tree(parts[:half]), tree(parts[half:]), strict=True)
    return [left + right for left, right in pairs]


@given(count=st.integers(1, 40))
def test_parts_are_added_as_the_tree_says(count: int) -> None:
    expected = tree(leaves(count))
    for found, value in zip(pairwise_sum(leaves(count)), expected, strict=True):
        assert torch.equal(found, value)


@pytest.mark.parametrize("count", [4, 8, 32])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_show(count: int, workers: int) -> None:
    """Each forms the subtree of its share; the subtrees are leaves of the rest."""
    share, parts = count // workers, leaves(count)
    subtrees = [pairwise_sum(parts[w * share : (w + 1) * share]) for w in range(workers)]
    for found, value in zip(pairwise_sum(subtrees), tree(leaves(count)), strict=True):
        assert torch.equal(found, value)


def test_order_matters_else_the_tree_would_prove_nothing() -> None:
    (total, _), parts = tree(leaves(32)), leaves(32)
    assert not torch.equal(total, sum((part[0] for part in parts[1:]), parts[0][0]))


def test_one_worker_has_nothing_to_add() -> None:
    value = torch.ones(3)
    total = TreeSum(World())
    total([value])
    assert total.is_exact and torch.equal(value, torch.ones(3))
    assert not World().any(False) and World().any(True)
