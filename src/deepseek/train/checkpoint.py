"""Checkpoints: written beside the training, whole or not at all, found again and checked.

A checkpoint is a folder `step-00000120` with the files of `torch.distributed.checkpoint` (weights
and optimizer state by name, so that another number of workers can read them, and what each worker's
transport remembers, in a file that this worker writes) and `state.json`: where the run stands, and
the checksum of each file. It gets its name only when all is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.optim import Optimizer

from deepseek.config import Config
from deepseek.errors import CapacityError, FormatError, describe
from deepseek.parallel import World, local_of

_LOG = logging.getLogger(__name__)
_STATE = "state.json"
_TRANSPORT = "transport"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position(Config):
    """Where a run stands: what was done before, in whole steps."""

    stage: int = 0
    """Number of the stage that goes on."""
    step: int = 0
    """Steps of that stage that are done: its samples are the first `step * batch`."""
    total_steps: int = 0
    """Steps of all stages that are done."""


class Checkpoints:
    """The checkpoints of a run. Every worker makes one, together."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        """Take a folder.

        Args:
            folder: theirs alone; made when it is needed.
            world: the workers.
            keep: how many of the newest stay.
        """
        self._folder, self._world, self._keep = folder, world, keep
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        position: Position,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        remembered: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the state, and write it while training goes on.

        Args:
            position: where the run stands.
            model: the same on all workers.
            optimizers: likewise.
            remembered: of this worker's transport, under names that no other worker's has.

        Raises:
            CapacityError: the checkpoint before this one could not be written.
        """
        self.wait()
        state = _state(model, optimizers)
        if remembered:
            state[_TRANSPORT] = dict(remembered)
        self._pending = self._writer.submit(self._write, position, _copied(state))

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is there.

        Raises:
            CapacityError: it could not be written; older ones are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            older = self.newest()
            left = "there is no older one" if older is None else f"{older.name} is whole"
            step = f"Make room and start again: {left}"
            got = " ".join(str(error).split())
            raise CapacityError(
                describe("checkpoint", str(self._folder), "written", got, step)
            ) from error

    def newest(self) -> Path | None:
        """Return the newest checkpoint that has a name, damaged or not."""
        return next(iter(self._all()), None)

    def load(self, model: nn.Module, optimizers: Sequence[Optimizer], path: Path) -> None:
        """Fill a model and its optimizers in place from a checkpoint that `find` gave."""
        state = _state(model, optimizers)
        with _one_process_is_fine():
            load_state(
                state, checkpoint_id=path, process_group=self._group, no_dist=not self._group
            )
        set_model_state_dict(model, state["model"], options=_OPTIONS)
        if optimizers:
            set_optimizer_state_dict(model, list(optimizers), state["optimizer"], options=_OPTIONS)

    def remembered(self, path: Path) -> Mapping[str, Tensor]:
        """Return what the transports of all workers remembered in a checkpoint that `find` gave."""
        return _Remembered(path)

    def find(self) -> tuple[Path, Position] | None:
        """Return the newest checkpoint that is whole, and where it stands; None without any.

        Raises:
            FormatError: there are checkpoints and all are damaged.
        """
        damage = ""
        for path in self._all():
            try:
                return path, _read_state(path)
            except FormatError as error:
                damage = damage or str(error)
                _LOG.warning("%s", error)
        if damage:
            raise FormatError(damage)
        return None

    def close(self) -> None:
        """Wait for what is being written, whatever becomes of it."""
        self._writer.shutdown(wait=True)

    def _all(self) -> Iterator[Path]:
        yield from sorted(self._folder.glob("step-*"), reverse=True)

    def _write(self, position: Position, state: dict[str, dict[str, Any]]) -> None:
        path = self._folder / f"step-{position.total_steps:08d}"
        fresh = path.with_name(f".{path.name}.new")
        if self._world.is_first:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)
        with _one_process_is_fine():
            save_state(
                state, checkpoint_id=fresh, process_group=self._group, no_dist=not self._group
            )
        if not self._world.is_first:
            return
        sums = {file.name: _sha256_of(file) for file in sorted(fresh.iterdir())}
        facts = {"position": position.to_dict(), "files": sums}
        with (fresh / _STATE).open("w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        fresh.rename(path)
        for old in list(self._all())[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)


class _Remembered(Mapping[str, Tensor]):
    """Tensors of a checkpoint of which only those that are asked for are read, one at a time."""

    def __init__(self, path: Path) -> None:
        self._path, self._sizes = path, dict[str, torch.Size]()
        for name, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items():
            part, _, rest = name.partition(".")
            if part == _TRANSPORT and isinstance(entry, TensorStorageMetadata):
                self._sizes[rest] = entry.size

    def __getitem__(self, name: str) -> Tensor:
        value = torch.empty(self._sizes[name])
        with _one_process_is_fine():
            load_state({_TRANSPORT: {name: value}}, checkpoint_id=self._path, no_dist=True)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def _state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {"model": get_model_state_dict(model, options=_OPTIONS)}
    if optimizers:
        state["optimizer"] = dict(
            get_optimizer_state_dict(model, list(optimizers), options=_OPTIONS)
        )
    return state


def _copied(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return copies that training does not change; tensors that share memory share it again."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # a tensor that is divided over workers has no address of its own, only its part here has
        key = local_of(value).data_ptr(), value.shape
        return copies.setdefault(key, value.detach().clone())

    return {
        part: {name: copied(value) for name, value in values.items()}
        for part, values in state.items()
    }


def _read_state(path: Path) -> Position:
    try:
        facts = json.loads((path / _STATE).read_text(encoding="utf-8"))
        position, sums = Position.from_dict(facts["position"]), dict(facts["files"])
        for name, expected in sums.items():
            if _sha256_of(path / name) != expected:
                raise _damaged(path, f"{name} as it was written", "other bytes")
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise _damaged(path, "whole", f"{type(error).__name__}: {error}") from error
    return position


def _damaged(path: Path, must: str, got: str) -> FormatError:
    step = "An older one is used where there is one"
    return FormatError(describe("checkpoint", str(path), must, got, step))


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
