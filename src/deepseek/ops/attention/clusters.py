"""Mean keys of clusters, which stand for the keys of a block where blocks are judged."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CLUSTERS = 8
ROUNDS = 2


def summarize(keys: Tensor) -> Tensor:
    """Return the mean keys of the clusters of each block: [..., 64, dim] to [..., 8, dim].

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
    for _ in range(ROUNDS):
        away = (blocks[:, :, None] - found[:, None]).square().sum(-1)
        belongs = torch.nn.functional.one_hot(away.argmin(-1), NUM_CLUSTERS).to(keys.dtype)
        counts = belongs.sum(1)[..., None]
        found = torch.where(
            counts > 0, belongs.transpose(1, 2) @ blocks / counts.clamp(min=1), found
        )
    return found.unflatten(0, keys.shape[:-2])
