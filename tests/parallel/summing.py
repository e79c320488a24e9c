"""What the processes of `test_transport.py` do: sums by every way, written to a folder.

python summing.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from deepseek.parallel import Exact, Sparse24, World, joined_world, open_transport
from deepseek.parallel.overlap import EarlySum

STEPS = 3
CONFIGS = {
    "exact": Exact(),
    "float8": Sparse24(feedback=1.0),
    "bfloat16": Sparse24(values="bfloat16", feedback=1.0),
    "halving": Sparse24(feedback=0.5),
    "forgetting": Sparse24(feedback=0.0),
}


def gradients(rank: int, step: int) -> list[Tensor]:
    """Return what a worker adds in a step; odd shapes, and a vector and a loss among them."""
    torch.manual_seed(100 * step + rank)
    return [torch.randn(37, 21), torch.randn(33), torch.randn(3, 5, 7), torch.randn(1)]


def run(world: World, folder: Path) -> None:
    """Sum in each way, at once and bucket by bucket in another order; last what is no number."""
    found: dict[str, object] = {}
    for name, config in CONFIGS.items():
        whole, early = open_transport(config, world), open_transport(config, world)
        sums = EarlySum(early, gradients(0, 0), in_background=True)
        for step in range(STEPS):
            tensors, others = gradients(world.rank, step), gradients(world.rank, step)
            whole(tensors)
            for number in torch.randperm(len(others)).tolist():
                sums.give(number, others[number])
            sums.finish()
            found[f"{name}.{step}"], found[f"{name}.{step}.early"] = tensors, others
            if step == 0:
                found[f"{name}.first"] = {
                    key: error.clone() for key, error in whole.state_dict().items()
                }
        sums.close()
        found[f"{name}.bytes"], found[f"{name}.state"] = whole.num_bytes, whole.state_dict()
        bad = gradients(world.rank, 0)
        if world.rank == world.size - 1:
            bad[0][0, 0] = torch.nan
        whole(bad)
        found[f"{name}.bad"] = bad
        found[f"{name}.after"] = whole.state_dict()
    torch.save(found, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined_world() as joined:
        run(joined, Path(sys.argv[1]))
