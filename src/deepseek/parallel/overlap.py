"""Sums over the workers that begin before all of the tensors are there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from deepseek.parallel.base import Transport, divide


class EarlySum:
    """Adds up tensors over the workers, each bucket as soon as it is complete.

    Buckets go in the order of `divide`, one after another, whatever order their tensors come in: so
    all workers do the same, and when a bucket is sent does not show in the bits.
    """

    def __init__(
        self, transport: Transport, tensors: Sequence[Tensor], *, in_background: bool
    ) -> None:
        """Prepare sums of tensors like these.

        Args:
            transport: adds up.
            tensors: in the order in which `transport` would be given them.
            in_background: in a thread, so that the caller goes on meanwhile.
        """
        self._transport = transport
        self._buckets = divide(tensors)
        self._thread = ThreadPoolExecutor(1, "sums") if in_background else None
        self._given: dict[int, Tensor] = {}
        self._next = 0
        self._running: list[Future[None]] = []

    def give(self, number: int, tensor: Tensor) -> None:
        """Hand over a tensor, to be replaced by its sum.

        Args:
            number: its place among the tensors.
            tensor: not touched by the caller before `finish`.
        """
        self._given[number] = tensor
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if not all(each in self._given for each in bucket):
                return
            self._send(self._next, [self._given[each] for each in bucket])
            self._next += 1

    def _send(self, number: int, tensors: list[Tensor]) -> None:
        if self._thread is None:
            self._transport.sum_bucket(number, tensors)
        else:
            self._running.append(self._thread.submit(self._transport.sum_bucket, number, tensors))

    def finish(self) -> None:
        """Wait until every tensor, all of them given, is its sum; then begin anew."""
        assert self._next == len(self._buckets), "not every tensor was given"
        running, self._running = self._running, []
        for sent in running:
            sent.result()
        self._given, self._next = {}, 0

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()
