"""Whether fewer bytes pay: what a step takes over a network, by arithmetic.

Bytes are those that one worker hands on; a network is how many of them it takes a second. Not in
it: the time that a message takes whatever its size, and workers that wait for a slower one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from deepseek.parallel.compress import BLOCK, Codec

Way = Literal["tree", "ring", "ring-bfloat16", "sparse24-float8", "sparse24-bfloat16"]
"""Float32 over pairs of workers or round a ring, bfloat16 round a ring, or packed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is the same whichever way gradients go."""

    num_values: int
    """Gradients, all of them in matrices."""
    workers: int
    compute_s: float
    """A step's forward and backward passes, and the optimizer, without any sending."""
    hidden_s: float = 0.0
    """How much of it sending may go on beside: the last part's backward pass."""
    encode_s: float = 0.0
    """Packing a value, on what computes the gradients."""
    decode_s: float = 0.0
    """Reading a value back."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one way is predicted to take."""

    num_bytes: int
    """That a worker hands on in a step."""
    codec_s: float
    """Packing and reading of a step."""
    step_s: float
    """A whole step."""


def wire_bytes(num_values: int, workers: int, way: Way) -> int:
    """Return the bytes that a worker hands on in a step.

    Args:
        num_values: gradients, in one bucket.
        workers: how many; for `tree` a power of two.
        way: how they go.
    """
    if workers == 1:
        return 0
    if way == "tree":
        return (workers - 1).bit_length() * 4 * num_values
    if way in ("ring", "ring-bfloat16"):
        return 2 * (workers - 1) * (4 if way == "ring" else 2) * num_values // workers
    blocks = math.ceil(num_values / (BLOCK * workers))
    return 2 * (workers - 1) * blocks * _codec(way).row_bytes


def estimate(job: Job, way: Way, gbit_per_s: float) -> Estimate:
    """Return what a step is predicted to take.

    Packing is work of the processor that computes, so it is never hidden; sending is, as far as
    there is a backward pass beside it.

    Args:
        job: what is computed.
        way: how the gradients go.
        gbit_per_s: of each worker's link, 1e9 bits.
    """
    num_bytes = wire_bytes(job.num_values, job.workers, way)
    codec_s = 0.0
    if way.startswith("sparse24") and job.workers > 1:
        # each packs as much as there is: its part of the others' slices, and the sum of its own. It
        # reads all of that back for the errors, the others' parts of its slice, and their sums
        share = (job.workers - 1) / job.workers
        codec_s = job.num_values * (job.encode_s + (1 + 2 * share) * job.decode_s)
    send_s = num_bytes * 8 / (gbit_per_s * 1e9)
    return Estimate(num_bytes, codec_s, job.compute_s + codec_s + max(0.0, send_s - job.hidden_s))


def pays_below(job: Job, way: Way, other: Way) -> float:
    """Return the speed of the links, in Gbit/s, below which one way takes less time than another.

    Zero where it never does, infinity where it always does.

    Args:
        job: what is computed.
        way: the one that packs.
        other: the one that does not.
    """
    packed, plain = estimate(job, way, math.inf), estimate(job, other, math.inf)
    if packed.num_bytes >= plain.num_bytes:
        return 0.0
    # at the border the plain way is exposed by just what packing takes; either the packed bytes are
    # hidden by then, or both ways are exposed and their hidden parts cancel
    seconds = max(
        (packed.codec_s + job.hidden_s) / plain.num_bytes,
        packed.codec_s / (plain.num_bytes - packed.num_bytes),
    )
    return 8 / seconds / 1e9 if seconds else math.inf


def _codec(way: Way) -> Codec:
    return Codec("float8" if way == "sparse24-float8" else "bfloat16")
