"""Runs a function in several processes that find each other over gloo, for tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from deepseek.parallel import World, joined_world
from deepseek.parallel.launch import STORE


def in_processes(work: Callable[..., Any], num_processes: int, *arguments: Any) -> list[Any]:
    """Return what `work(world, *arguments)` gives in each process, in the order of their ranks."""
    with tempfile.TemporaryDirectory() as place:
        mp.spawn(_run, (work, num_processes, place, arguments), nprocs=num_processes)
        return [
            torch.load(Path(place) / f"{rank}", weights_only=False) for rank in range(num_processes)
        ]


def _run(
    rank: int, work: Callable[..., Any], size: int, place: str, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", STORE: f"{place}/store"}
    torch.set_num_threads(1)
    with joined_world() as world:
        assert isinstance(world, World)
        torch.save(work(world, *arguments), Path(place) / f"{rank}")
