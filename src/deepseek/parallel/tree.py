"""Sums in one order, whoever adds: the same bits on 1, 2, 4 … workers.

Addition of floats depends on its order. Here the parts 0 … n-1 of a sum are the leaves of one
binary tree: neighbours are added, then neighbours of those. A worker that holds an aligned power of
two of the leaves can form its subtree alone, and the workers' subtrees are joined pair by pair; so
how many workers there are does not show in the result, as long as parts and workers are powers of
two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.parallel.base import Transport
from deepseek.parallel.world import World


def pairwise_sum(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sum of lists of tensors in the order of the tree; the parts are used up.

    Holds one list more than the number of parts has binary digits.

    Args:
        parts: each of the same shapes, at least one.
    """
    total, last = PairwiseSum(), None
    for part in parts:
        if last is not None:
            total.add(last)
        last = part
    assert last is not None
    return [total.finish(number, value) for number, value in enumerate(last)]


class PairwiseSum:
    """A sum in the order of the tree whose last part may come tensor by tensor."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._waiting: list[tuple[int, list[Tensor]]] = []

    def add(self, part: Sequence[Tensor]) -> None:
        """Add a part that is not the last; it is used up."""
        height, total = 0, list(part)
        while self._waiting and self._waiting[-1][0] == height:
            left = self._waiting.pop()[1]
            for one, other in zip(left, total, strict=True):
                one += other
            height, total = height + 1, left
        self._waiting.append((height, total))

    def finish(self, number: int, value: Tensor) -> Tensor:
        """Return the sum of one tensor, given the last part's; both are used up.

        Args:
            number: of the tensor within its part.
            value: of the last part.
        """
        for _, part in reversed(self._waiting):
            value = part[number].add_(value)
        return value


class TreeSum(Transport):
    """Adds up tensors over the workers, in place, as they are."""

    def __init__(self, world: World) -> None:
        """Make the groups of two that meet at each height; every worker must do so together."""
        self._world = world
        self._partners: list[dist.ProcessGroup] = []
        self.is_exact = world.size & (world.size - 1) == 0
        self.num_bytes = 0
        distance = 1
        while self.is_exact and distance < world.size:
            for first in range(world.size):
                if first & distance:
                    continue
                pair = [first, first | distance]
                group = dist.new_group(pair)
                if world.rank in pair:
                    assert isinstance(group, dist.ProcessGroup)
                    self._partners.append(group)
            distance *= 2

    def sum_bucket(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors, of one dtype, by their sums over the workers."""
        if self._world.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        for group in self._partners or [dist.group.WORLD]:
            dist.all_reduce(flat, group=group)
        # gloo reduces in a ring: of two that is all of it, of n workers 2 (n - 1) / n times it
        size = self._world.size
        self.num_bytes += len(self._partners) * flat.nbytes or 2 * (size - 1) * flat.nbytes // size
        put_back(flat, tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: a tree remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: a tree remembers nothing."""


def put_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy values that lie one after another into the tensors that they are of."""
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(part.view_as(tensor))
