"""Memory that ran out in training, told as one error with a way on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from deepseek.errors import CapacityError, describe, is_out_of_memory
from deepseek.train.places import Places


@contextlib.contextmanager
def memory_errors_told(places: Places) -> Iterator[None]:
    """Turn memory that runs out inside into one error, which names the checkpoint to go on from.

    Raises:
        CapacityError: it ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        newest = max(places.checkpoints.glob("step-*"), default=None)
        left = "there is no checkpoint yet" if newest is None else f"{newest.name} is whole"
        step = (
            "Take a smaller micro_batch, recompute: true or a shorter length, and start again: "
            f"{left}"
        )
        words = str(error).rpartition("DefaultCPUAllocator: ")[2]
        got = " ".join(words.split()) or "no more"
        raise CapacityError(
            describe("memory", "training", "enough for a step", got, step)
        ) from error
