"""Adapters in an engine: which weights take one, and how long it stays in memory."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.graph import Program
from deepseek.graph.program import LOGITS
from deepseek.ops.low_rank import MAX_RANK, LowRankUpdate

NO_ADAPTER = -1
"""What stands in a step for a token without an adapter."""


class EngineAdapter:
    """An adapter as an engine has packed it. Its memory is given back when nobody holds it."""

    def __init__(self, native: Any, number: int) -> None:
        """Hold the adapter of a number."""
        self.number = number
        """What stands for it in `Engine.step`; never that of another adapter."""
        # a step that runs on another thread keeps what it uses
        weakref.finalize(self, native.drop_adapter, number).atexit = False


def pack_adapter(
    native: Any, program: Program, name: str, updates: Mapping[str, LowRankUpdate]
) -> EngineAdapter:
    """Return an adapter in the memory of a native program.

    Args:
        native: the compiled program.
        program: that it was made from.
        name: for errors.
        updates: by the decoder's own names of the weights.

    Raises:
        ConfigError: a weight is not there or takes no adapter, or a shape does not fit.
        CapacityError: there is not enough memory.
    """
    owner = f"adapter {name!r}"
    if not updates:
        raise ConfigError(describe("weights", owner, "at least one", 0))
    numbers = _numbers(program)
    given = []
    for weight, update in updates.items():
        if weight not in numbers:
            must = "of a layer's attention, its gates, its dense feed-forward part or its router"
            step = "The embedding, the head and routed experts take no adapter"
            raise ConfigError(describe("weight", owner, must, weight, step))
        _check_shape(owner, weight, update, native.weight_shape(numbers[weight]))
        down, up = (np.ascontiguousarray(each, np.float32) for each in update[:2])
        given.append((numbers[weight], down, up, float(update.scale)))
    try:
        return EngineAdapter(native, native.add_adapter(given))
    except MemoryError as error:
        must, got = (
            "small enough for memory",
            sum(each.nbytes for _, *two, _ in given for each in two),
        )
        raise CapacityError(describe("bytes", owner, must, got, "Drop another one")) from error


def _numbers(program: Program) -> dict[str, int]:
    """Return the numbers of the weights that take an adapter."""
    names = dict.fromkeys(name for item in program.instructions for name in item.weights)
    taken = {
        name
        for item in program.instructions
        if item.op not in ("linear", "swiglu") or item.output == LOGITS
        for name in item.weights
    }
    return {name: place for place, name in enumerate(names) if name not in taken}


def _check_shape(owner: str, weight: str, update: LowRankUpdate, shape: tuple[int, int]) -> None:
    n, k = shape
    down, up = update.down.shape, update.up.shape
    fits = len(down) == len(up) == 2 and down[1] == k and up[0] == n and down[0] == up[1]
    if not fits or not 1 <= down[0] <= MAX_RANK:
        must = f"[rank, {k}] and [{n}, rank], the rank from 1 to {MAX_RANK}"
        raise ConfigError(describe(f"shapes of {weight!r}", owner, must, (down, up)))
