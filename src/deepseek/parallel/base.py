"""The seam between training and what carries its gradients from worker to worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

BUCKET_BYTES = 32 << 20
"""What is sent at once."""


class Transport(ABC):
    """Adds up tensors over the workers.

    Contract: every worker calls the same methods in the same order with tensors of the same shapes.
    Afterwards all workers hold the same bits. A value that is not finite on one worker makes the
    sum not finite on all.
    """

    is_exact: bool
    """Whether the number of workers does not show in the result."""
    num_bytes: int
    """Bytes that this worker has handed to others since it was made."""

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the workers."""
        for number, bucket in enumerate(divide(tensors)):
            self.sum_bucket(number, [tensors[index] for index in bucket])

    @abstractmethod
    def sum_bucket(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors of one bucket of `divide` by their sums over the workers.

        Args:
            number: of the bucket. What is remembered from step to step is remembered by it.
            tensors: all of the bucket, in its order.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return what this worker remembers from step to step; names differ between workers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what all workers remembered, whatever their number was.

        Args:
            state: of all workers together; only what this worker needs is read.
        """


def divide(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of the tensors of each bucket, the same for every worker.

    Matrices come in reverse: so a backward pass finishes their gradients. What has fewer
    dimensions (norms, biases, the loss) comes last, by itself: it is little, and is sent as it is.

    Args:
        tensors: in the order of the parameters.
    """
    buckets: list[list[int]] = []
    before, size = None, 0
    numbers = sorted(range(len(tensors)), key=lambda number: (tensors[number].dim() < 2, -number))
    for number in numbers:
        kind = (tensors[number].dim() < 2, tensors[number].dtype)
        if kind != before or size >= BUCKET_BYTES:
            buckets.append([])
            before, size = kind, 0
        buckets[-1].append(number)
        size += tensors[number].nbytes
    return buckets
