"""The mesh: over which axes a model and its data are divided, and this process's place in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.parallel.world import World

AXES = ("pipeline", "data", "expert", "shard", "tensor")
"""From the axis whose neighbours are farthest apart to the one whose neighbours talk most."""
READING_AXES = ("data", "expert", "shard")
"""Along these each process reads samples of its own; along the others they read the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Config):
    """A parallel plan: how many processes stand along each axis."""

    data: int | None = None
    """Whole replicas, each with samples of its own; None for as many as processes are left."""
    shard: int = 1
    """Processes that share weights, gradients and moments, and gather a layer when it computes."""
    tensor: int = 1
    """Processes that divide every layer's heads and channels, and the vocabulary."""
    pipeline: int = 1
    """Processes that hold consecutive layers."""
    expert: int = 1
    """Processes that divide the experts, and send each token to where its experts are."""

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ConfigError(describe(axis, "Mesh", "at least 1", size))

    @property
    def is_divided(self) -> bool:
        """Whether a model is divided at all: more than replicas of the whole."""
        return self.shard * self.tensor * self.pipeline * self.expert > 1

    def sized(self, num_processes: int) -> Mesh:
        """Return the same with the number of replicas that makes it up to so many processes.

        Raises:
            ConfigError: the axes do not multiply to it.
        """
        others = self.shard * self.tensor * self.pipeline * self.expert
        sizes = ", ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if axis != "data")
        if self.data is None and num_processes % others == 0:
            return self.replace(data=num_processes // others)
        if self.data is None or self.data * others != num_processes:
            must = f"one whose sizes multiply to the {num_processes} processes"
            got = sizes if self.data is None else f"{sizes}, data {self.data}"
            raise ConfigError(
                describe(
                    "mesh",
                    "the run",
                    must,
                    got,
                    "Start another number of workers, or change its sizes",
                )
            )
        return self


class Grid:
    """The processes of a mesh, and this one among them. All make it together."""

    def __init__(self, mesh: Mesh, world: World) -> None:
        """Join the processes along each axis.

        Args:
            mesh: its sizes.
            world: every process, joined already.

        Raises:
            ConfigError: the sizes do not multiply to the number of processes.
        """
        self.mesh = mesh.sized(world.size)
        self.world = world
        sizes = [self.size(axis) for axis in AXES]
        self._devices: DeviceMesh | None = None
        if world.size > 1:
            self._devices = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=AXES)

    def size(self, axis: str) -> int:
        """Return how many processes stand along an axis."""
        return getattr(self.mesh, axis) or 1

    def place(self, axis: str) -> int:
        """Return where this process stands along an axis, from 0."""
        return 0 if self._devices is None else self._devices.get_local_rank(axis)

    def along(self, *axes: str) -> DeviceMesh:
        """Return the processes along some axes that share this one's place on the others.

        Args:
            axes: in the order of `AXES`.
        """
        assert self._devices is not None
        return self._devices[axes]

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the processes along one axis as a group."""
        assert self._devices is not None
        return self._devices.get_group(axis)

    @property
    def reader(self) -> World:
        """This process among those that read samples of their own."""
        rank = 0
        for axis in READING_AXES:
            rank = rank * self.size(axis) + self.place(axis)
        return World(rank, math.prod(self.size(axis) for axis in READING_AXES))

    @property
    def is_counted(self) -> bool:
        """Whether this process stands for those that read the same samples."""
        return self.place("tensor") == 0 and self.place("pipeline") == 0

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this process is the first of those that hold the same layers."""
        return all(self.place(axis) == 0 for axis in AXES if axis != "pipeline")

    def sum(self, tensors: Sequence[Tensor], axes: Iterable[str]) -> None:
        """Replace each tensor by its sum along some axes; all must be plain and of one dtype."""
        wanted = [axis for axis in axes if self.size(axis) > 1]
        if not wanted or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        for axis in wanted:
            dist.all_reduce(flat, group=self.group(axis))
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))
