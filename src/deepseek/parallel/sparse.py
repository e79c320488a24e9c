"""Sums over the workers in a sixth of the bytes, with an error that is kept and sent later.

The sum of two tensors with two of four kept does not have that form, so it cannot travel round a
ring. Each worker owns a slice of every bucket instead:

1. it packs the others' slices (`Codec`) and sends each to its owner: an all-to-all;
2. the owner reads what came, and adds it in float32 to its own slice, which was never packed;
3. it packs the sum and sends it to all: an all-gather.

What both packings lose is remembered, and added before the next packing of the same values: error
feedback (Karimireddy et al., 1901.09847, algorithm 2), with an error on both sides as in "1-bit
Adam" (Tang et al., 2102.02888, algorithm 1, whose delta is our worker's error, and delta-bar our
owner's). A worker's error in its own slice is that of the sum, in the others' slices that of what
it sent; so one tensor holds both, and the errors of all workers added up are what the training has
not seen yet. That sum is what is kept when the workers change.

Of an error only a share may be remembered, as in Wu et al., "Error compensated quantized SGD"
(1806.08054), whose decay factor this is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.errors import FormatError, ShapeError, describe
from deepseek.parallel.base import Transport
from deepseek.parallel.compress import BLOCK, Codec, Values
from deepseek.parallel.tree import TreeSum, put_back
from deepseek.parallel.world import World

_NAME = re.compile(r"bucket-(\d+)\.worker-(\d+)-of-(\d+)")


class SparseSum(Transport):
    """Adds up matrices over the workers in few bits, and all else as it is."""

    def __init__(self, world: World, values: Values, feedback: float = 1.0) -> None:
        """Begin without errors; every worker must do so together.

        Args:
            world: the workers. One alone sends nothing and loses nothing.
            values: what kept values are sent as.
            feedback: share of what is lost that is remembered.
        """
        self._world, self._codec, self._exact = world, Codec(values), TreeSum(world)
        self._feedback = feedback
        self._errors: dict[int, Tensor] = {}
        self.num_bytes = 0
        self.is_exact = False

    def sum_bucket(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors of one bucket by their sums over the workers.

        Raises:
            ShapeError: matrices are not float32.
            FormatError: the errors of a checkpoint are of other buckets.
        """
        if tensors[0].dim() < 2:
            before = self._exact.num_bytes
            self._exact.sum_bucket(number, tensors)
            self.num_bytes += self._exact.num_bytes - before
            return
        if tensors[0].dtype != torch.float32:
            raise ShapeError(describe("gradients", "SparseSum", "float32", tensors[0].dtype))
        count = sum(tensor.numel() for tensor in tensors)
        error = self._errors.get(number)
        if error is not None and len(error) != count:
            must = f"{count} values in bucket {number}"
            step = "It was written by another version, or of another model"
            raise FormatError(describe("error feedback", "the checkpoint", must, len(error), step))
        flat = torch.zeros(
            owned(count, self._world.size) * self._world.size, device=tensors[0].device
        )
        torch.cat([tensor.reshape(-1) for tensor in tensors], out=flat[:count])
        if error is not None:
            flat[:count] += error
        self._errors.pop(number, None)
        if self._world.size > 1:
            lost = self._exchange(flat)[:count]
            if self._feedback > 0:
                self._errors[number] = lost.mul_(self._feedback)
        put_back(flat[:count], tensors)

    def _exchange(self, flat: Tensor) -> Tensor:
        """Replace values [workers * slice] by what all read as their sum, and return what was lost
        of them."""
        codec, rank, size = self._codec, self._world.rank, self._world.size
        slices = flat.view(size, -1)
        others = [worker for worker in range(size) if worker != rank]
        sent = torch.stack([codec.encode(slices[other]) for other in others])
        received = self._to_owners(sent)
        lost, read = torch.empty_like(slices), torch.empty_like(slices[rank])
        for other, packed in zip(others, sent, strict=True):
            torch.sub(slices[other], codec.decode(packed, read), out=lost[other])
        total = slices[rank]
        for packed in received:
            total += codec.decode(packed, read)
        everyones = self._to_all(codec.encode(total))
        torch.sub(total, codec.decode(everyones[rank], read), out=lost[rank])
        total.copy_(read)
        for other in others:
            codec.decode(everyones[other], slices[other])
        # what is not finite must reach the caller, but not stay
        if not bool(lost.sum().isfinite()):
            lost.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return lost.view(-1)

    def _to_owners(self, sent: Tensor) -> Tensor:
        """Give each other worker its part, and return those for this one, in the workers' order."""
        received = torch.empty_like(sent)
        splits = [0 if worker == self._world.rank else 1 for worker in range(self._world.size)]
        dist.all_to_all_single(received, sent, splits, splits)
        self.num_bytes += sent.nbytes
        return received

    def _to_all(self, packed: Tensor) -> Tensor:
        """Return the rows of bytes of all workers, in their order."""
        everyones = packed.new_empty(self._world.size, *packed.shape)
        dist.all_gather_single(everyones.view(-1), packed.view(-1))
        self.num_bytes += packed.nbytes * (self._world.size - 1)
        return everyones

    def state_dict(self) -> dict[str, Tensor]:
        """Return this worker's error of each bucket, named `bucket-3.worker-0-of-2`."""
        mine = f"worker-{self._world.rank}-of-{self._world.size}"
        return {f"bucket-{number}.{mine}": error for number, error in self._errors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the errors of all workers: as they were, or where the number of workers is
        another one, each owner with the sum of the errors in its slice.

        Raises:
            FormatError: a name is not of `state_dict`, or a worker's errors are missing.
        """
        self._errors = own_errors(state, self._world)


def owned(count: int, size: int) -> int:
    """Return how many of a bucket's values each of so many workers owns: whole blocks, of which the
    last may be beyond its end."""
    return -(-count // (BLOCK * size)) * BLOCK


def own_errors(state: Mapping[str, Tensor], world: World) -> dict[int, Tensor]:
    """Return the errors that one worker goes on with, by bucket.

    They are its own where there are as many workers as there were. Where not, each goes on with the
    sum of all errors in the slices that it owns, and without any elsewhere: nothing is lost.

    Args:
        state: of all workers that there were; read bucket by bucket, and tensor by tensor.
        world: this worker among those that there are.

    Raises:
        FormatError: a name is not of `SparseSum.state_dict`, or a worker's errors are missing.
    """
    found: dict[int, Tensor] = {}
    for number, size in sorted(_buckets_of(state)):
        names = [f"bucket-{number}.worker-{rank}-of-{size}" for rank in range(size)]
        if size == world.size:
            found[number] = state[names[world.rank]].clone()
            continue
        total = state[names[0]].clone()
        for name in names[1:]:
            total += state[name]
        each = owned(len(total), world.size)
        total[: world.rank * each] = 0
        total[(world.rank + 1) * each :] = 0
        found[number] = total
    return found


def _buckets_of(state: Mapping[str, Tensor]) -> set[tuple[int, int]]:
    """Return the number of each bucket, and of the workers that remembered it."""
    found: dict[tuple[int, int], set[int]] = {}
    for name in state:
        match = _NAME.fullmatch(name)
        if match is None:
            must = "named bucket-N.worker-N-of-N"
            raise FormatError(describe("error feedback", "the checkpoint", must, name))
        number, rank, size = map(int, match.groups())
        found.setdefault((number, size), set()).add(rank)
    for (number, size), ranks in found.items():
        if ranks != set(range(size)):
            must = f"of all {size} workers in bucket {number}"
            got = sorted(ranks)
            raise FormatError(describe("error feedback", "the checkpoint", must, got))
    return set(found)
