"""Sums in one order, whoever adds: the same bits on 1, 2, 4 … workers.

Addition of floats depends on its order. Here the parts 0 … n-1 of a sum are the leaves of one
binary tree: neighbours are added, then neighbours of those. A worker that holds an aligned power of
two of the leaves can form its subtree alone, and the workers' subtrees are joined pair by pair; so
how many workers there are does not show in the result, as long as parts and workers are powers of
two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.parallel.world import World

BUCKET_BYTES = 32 << 20
"""What is sent at once."""


def pairwise_sum(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sum of lists of tensors in the order of the tree; the parts are used up.

    Holds one list more than the number of parts has binary digits.

    Args:
        parts: each of the same shapes, at least one.
    """
    waiting: list[tuple[int, list[Tensor]]] = []
    for part in parts:
        height, total = 0, list(part)
        while waiting and waiting[-1][0] == height:
            total = _added(waiting.pop()[1], total)
            height += 1
        waiting.append((height, total))
    total = waiting.pop()[1]
    while waiting:
        total = _added(waiting.pop()[1], total)
    return total


def _added(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    for one, other in zip(left, right, strict=True):
        one += other
    return left


class TreeSum:
    """Adds up tensors over the workers, in place."""

    def __init__(self, world: World) -> None:
        """Make the groups of two that meet at each height; every worker must do so together."""
        self._world = world
        self._partners: list[dist.ProcessGroup] = []
        self.is_exact = world.size & (world.size - 1) == 0
        """Whether the number of workers does not show in the result."""
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

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the workers."""
        if self._world.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            for group in self._partners or [dist.group.WORLD]:
                dist.all_reduce(flat, group=group)
            sizes = [tensor.numel() for tensor in bucket]
            for tensor, part in zip(bucket, flat.split(sizes), strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Yield neighbours of one dtype, together of bounded size."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size >= BUCKET_BYTES or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
