"""The processes that compute together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from deepseek.parallel.launch import STORE

TIMEOUT = timedelta(hours=1)
"""How long one may wait for the others; the first may have much to tokenise."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those that compute together."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up in any process."""
        if self.size == 1:
            return flag
        flags: list[bool] = [False] * self.size
        dist.all_gather_object(flags, flag)
        return any(flags)


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Yield the world that `run_workers` or `torchrun` describes in the environment, joined over
    gloo; a world of one where none is described.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    store = os.environ.get(STORE)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}" if store else "env://",
        rank=int(os.environ["RANK"]),
        world_size=size,
        timeout=TIMEOUT,
    )
    try:
        dist.barrier()  # one that ends at once, by a mistake, would break the others' connecting
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
