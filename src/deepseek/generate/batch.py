"""The unfinished rows of a generation on an engine: their pages, and the choice of their tokens.

Loads no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from deepseek.errors import BackendError, describe
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE, Engine
from deepseek.generate.memory import Memory
from deepseek.ops.cpu import kernels
from deepseek.ops.sampling.config import Sampling
from deepseek.ops.sampling.native import RowChooser


class RowLike(Protocol):
    """What a batch needs to know of a row."""

    number: int
    prompt: list[int]
    tokens_left: int


class Batch(Protocol):
    """Rows that are decoded together; `start` once, then `step` and `keep` in any order."""

    depths: list[int] | None
    """Layers behind which the newest token of each row was chosen; None where that is always all
    of them."""

    def start(self) -> list[int]:
        """Read the prompts and return the first token of each row."""
        ...

    def step(self, tokens: list[int]) -> list[int]:
        """Append the newest token of each row and return the next ones."""
        ...

    def keep(self, slots: list[int]) -> None:
        """Let the other rows leave."""
        ...


class RowPages:
    """The pages of some rows on an engine, and how many tokens each row holds.

    Args:
        engine: whose pages they are.
        num_rows: rows.
        capacity: most tokens of a row.
        memory: what a row keeps when it is full; None for rows that are never.
    """

    def __init__(
        self, engine: Engine, num_rows: int, capacity: int, memory: Memory | None = None
    ) -> None:
        self._engine, self._memory = engine, memory
        per_row = -(-(capacity if memory is None else min(capacity, memory.max_len)) // PAGE_SIZE)
        self.table = np.arange(num_rows * per_row, dtype=np.int32).reshape(num_rows, per_row)
        self.pages = engine.new_pages(self.table.size)
        self.lengths = np.zeros(num_rows, np.int32)

    def room(self, row: int) -> int:
        """Return how many tokens a row can take before it is full."""
        return self.table.shape[1] * PAGE_SIZE - int(self.lengths[row])

    def make_room(self, row: int) -> None:
        """Let the oldest tokens of a row leave if it is full and has a memory."""
        memory = self._memory
        if memory is None or self.lengths[row] < memory.max_len:
            return
        own = self.table[row, memory.first // PAGE_SIZE :]
        own[:] = np.roll(own, -(memory.dropped // PAGE_SIZE))
        self._engine.turn_back(self.pages, own[: memory.mem_len // PAGE_SIZE], memory.dropped)
        self.lengths[row] -= memory.dropped

    def append(
        self,
        tokens: Sequence[int],
        rows: Sequence[int] | np.ndarray,
        selected: Sequence[int] | np.ndarray,
    ) -> np.ndarray:
        """Append tokens to their rows, which have room for them; return the logits of the selected
        ones. Arguments and errors as `Engine.step`."""
        lengths, positions = self.lengths.copy(), np.empty(len(tokens), np.int32)
        for place, row in enumerate(rows):
            positions[place] = lengths[row]
            lengths[row] += 1
        logits = self._engine.step(self.pages, tokens, positions, rows, self.table, selected)
        self.lengths = lengths
        return logits

    def keep(self, rows: list[int]) -> None:
        """Let the other rows leave; their pages stay."""
        self.table = np.ascontiguousarray(self.table[rows])
        self.lengths = self.lengths[rows]


class EngineBatch:
    """A batch on an engine. Prompts share steps of at most `MAX_STEP_TOKENS` tokens, unpadded."""

    depths: list[int] | None = None

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[RowLike],
        sampling: Sampling,
        memory: Memory | None = None,
    ) -> None:
        self._prompts = [row.prompt for row in rows]
        vocab_size, self._isa = engine.config.vocab_size, engine.instruction_set
        self._choosers = [
            RowChooser(
                sampling,
                row.prompt,
                vocab_size,
                row_generator(sampling.seed, row.number),
                instruction_set=self._isa,
            )
            for row in rows
        ]
        capacity = max(len(row.prompt) + row.tokens_left for row in rows)
        self._rows = RowPages(engine, len(rows), capacity, memory)
        self._is_greedy = sampling.is_greedy and not sampling.has_penalties

    def start(self) -> list[int]:
        """Read the prompts and return the first token of each row."""
        return self._choose(np.concatenate([self._read(places) for places in self._steps()]))

    def _steps(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the tokens of each step of reading as (row, place in its prompt); a step ends where
        a row is full, and is taken before the next one is asked for."""
        waiting: list[tuple[int, int]] = []
        for row, prompt in enumerate(self._prompts):
            room = self._rows.room(row)
            for place in range(len(prompt)):
                if len(waiting) == MAX_STEP_TOKENS or room == 0:
                    yield waiting
                    waiting = []
                if room == 0:
                    self._rows.make_room(row)
                    room = self._rows.room(row)
                waiting.append((row, place))
                room -= 1
        yield waiting

    def _read(self, places: list[tuple[int, int]]) -> np.ndarray:
        """Append tokens of prompts; return the logits of those that end one."""
        tokens = [self._prompts[row][place] for row, place in places]
        ends = [i for i, (row, place) in enumerate(places) if place == len(self._prompts[row]) - 1]
        return self._rows.append(tokens, [row for row, _ in places], ends)

    def step(self, tokens: list[int]) -> list[int]:
        """Append the newest token of each row and return the next ones."""
        logits: list[np.ndarray] = []
        for row in range(len(tokens)):
            self._rows.make_room(row)
        for start in range(0, len(tokens), MAX_STEP_TOKENS):
            rows = np.arange(start, min(start + MAX_STEP_TOKENS, len(tokens)), dtype=np.int32)
            part = tokens[start : start + MAX_STEP_TOKENS]
            logits.append(self._rows.append(part, rows, range(len(rows))))
        return self._choose(logits[0] if len(logits) == 1 else np.concatenate(logits))

    def keep(self, slots: list[int]) -> None:
        """Let the other rows leave; their pages stay until the batch ends."""
        self._choosers = [self._choosers[slot] for slot in slots]
        self._rows.keep(slots)

    def _choose(self, logits: np.ndarray) -> list[int]:
        if self._is_greedy:
            tokens = kernels().largest(self._isa, logits)
            _check_finite(logits[np.arange(len(tokens)), tokens])
            return tokens
        _check_finite(logits.max(axis=1))
        tokens = []
        for chooser, row in zip(self._choosers, logits, strict=True):
            tokens.append(chooser.choose(row))
            chooser.take(tokens[-1])
        return tokens


def row_generator(seed: int | None, row: int) -> random.Random:
    """Return the source of a row's random numbers; None for one that nobody can repeat."""
    return random.Random() if seed is None else random.Random(seed + row)


def _check_finite(largest: np.ndarray) -> None:
    for row, value in enumerate(largest.tolist()):
        if not math.isfinite(value):
            step = "The weights are damaged or the dtype overflows; try dtype='float32'"
            name = f"largest logit of row {row}"
            raise BackendError(describe(name, "sampling", "finite", value, step))
