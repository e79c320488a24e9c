"""Clusters of keys, which stand for the keys of a block where blocks are judged."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CLUSTERS = 16
ROUNDS = 2
SPREAD = 0.5
"""How much of a cluster's radius counts."""


def summarize(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean keys of the clusters of each block, and the root mean squares of the
    distances of a cluster's keys to its mean: [..., 64, dim] to [..., 16, dim] and [..., 16].

    Farthest point first, from the mean of all (Gonzalez 1985), then two rounds of k-means. A
    cluster that no key is nearest to stays where it was. The specification of what `cpu/choice.h`
    does.
    """
    blocks = keys.flatten(0, -3)
    rows = torch.arange(len(blocks), device=keys.device)
    nearest = (blocks - blocks.mean(1, keepdim=True)).square().sum(-1)
    means: list[Tensor] = []
    for _ in range(NUM_CLUSTERS):
        means.append(blocks[rows, nearest.argmax(1)])
        away = (blocks - means[-1][:, None]).square().sum(-1)
        nearest = away if len(means) == 1 else torch.minimum(nearest, away)
    found = torch.stack(means, 1)
    belongs = counts = found.new_zeros(0)
    for _ in range(ROUNDS):
        away = (blocks[:, :, None] - found[:, None]).square().sum(-1)
        belongs = torch.nn.functional.one_hot(away.argmin(-1), NUM_CLUSTERS).to(keys.dtype)
        counts = belongs.sum(1).clamp(min=1)
        moved = belongs.transpose(1, 2) @ blocks / counts[..., None]
        found = torch.where(belongs.any(1)[..., None], moved, found)
    away = (blocks[:, :, None] - found[:, None]).square().sum(-1)
    radii = ((belongs * away).sum(1) / counts).sqrt()
    return found.unflatten(0, keys.shape[:-2]), radii.unflatten(0, keys.shape[:-2])


def guess_scores(queries: Tensor, means: Tensor, radii: Tensor) -> Tensor:
    """Return a guess of the largest score of each query in each block: the score of a mean key, and
    for the keys on the query's side of it a part of the cluster's radius.

    Args:
        queries: [..., places, dim], scaled.
        means: [..., blocks, clusters, dim].
        radii: [..., blocks, clusters].

    Returns:
        [..., places, blocks].
    """
    scores = (queries @ means.flatten(-3, -2).transpose(-1, -2)).unflatten(-1, means.shape[-3:-1])
    reach = SPREAD * queries.norm(dim=-1)[..., None, None] * radii[..., None, :, :]
    return (scores + reach).amax(-1)
