"""Cross-entropy of a head whose words are divided over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek.ops.cross_entropy.reference import IGNORED
from deepseek.ops.head_loss import head_loss

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_CHUNK_LOGITS = 1 << 26
"""Logits of a chunk on one process: 256 MiB in float32."""


def is_split(weight: Tensor) -> bool:
    """Return whether a weight is divided over processes."""
    if type(weight) in (Tensor, nn.Parameter):
        return False  # so that nobody imports distributed tensors who has none
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def linear_cross_entropy_split(states: Tensor, weight: DTensor, labels: Tensor) -> Tensor:
    """Return the same as `linear_cross_entropy`, on every process alike.

    Each process forms the logits of its own words; of a row only its maximum, the sum of its
    exponentials and the logit of its label are exchanged.

    Args:
        states: [N, H], alike on every process.
        weight: of the head [V, H], its rows divided along a mesh of one axis.
        labels: int64 [N], -100 where none counts.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = weight.device_mesh
    _, (first, _) = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    entered = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
    places, counts, group = labels - first, labels != IGNORED, mesh.get_group()

    def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return _loss_and_slope(logits, places[part], counts[part], group)

    # alike everywhere, though one process may have a word less than its neighbour
    rows = max(1, _CHUNK_LOGITS * mesh.size() // weight.shape[0])
    inputs = entered.to_local(grad_placements=[Partial()])
    return head_loss(inputs, weight.to_local(), of_chunk, rows=rows)


def _loss_and_slope(
    logits: Tensor, places: Tensor, counts: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, and its gradient towards this process's logits.

    Args:
        logits: [n, words here].
        places: int64 [n], of the labels among the words here; outside of them elsewhere.
        counts: bool [n].
        group: those that have the other words.
    """
    wide = logits.float()
    top = wide.amax(-1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    exponentials = (wide - top[:, None]).exp()
    is_here = (places >= 0) & (places < logits.shape[1]) & counts
    here = places.clamp(0, logits.shape[1] - 1)[:, None]
    own = (wide.gather(1, here)[:, 0] - top).masked_fill(~is_here, 0.0)
    sums = torch.stack((exponentials.sum(-1), own))
    dist.all_reduce(sums, group=group)
    losses = sums[0].log() - sums[1]
    slope = exponentials / sums[0][:, None]
    slope.scatter_add_(1, here, -is_here[:, None].to(slope.dtype))
    slope.masked_fill_(~counts[:, None], 0.0)
    return losses.masked_fill(~counts, 0.0).sum(), slope.to(logits.dtype)
