"""The unfinished rows of a generation on an engine: their pages, and the choice of their tokens.

Loads no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from deepseek.errors import BackendError, describe
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE, Engine
from deepseek.ops.cpu import kernels
from deepseek.ops.sampling.config import Sampling


class RowLike(Protocol):
    """What a batch needs to know of a row."""

    number: int
    prompt: list[int]
    tokens_left: int


class Batch(Protocol):
    """Rows that are decoded together; `start` once, then `step` and `keep` in any order."""

    def start(self) -> list[int]:
        """Read the prompts and return the first token of each row."""
        ...

    def step(self, tokens: list[int]) -> list[int]:
        """Append the newest token of each row and return the next ones."""
        ...

    def keep(self, slots: list[int]) -> None:
        """Let the other rows leave."""
        ...


class EngineBatch:
    """A batch on an engine. Prompts share steps of at most `MAX_STEP_TOKENS` tokens, unpadded."""

    def __init__(self, engine: Engine, rows: Sequence[RowLike], sampling: Sampling) -> None:
        self._engine = engine
        self._prompts = [row.prompt for row in rows]
        self._choosers = [_Chooser(engine, row, sampling) for row in rows]
        per_row = -(-max(len(row.prompt) + row.tokens_left for row in rows) // PAGE_SIZE)
        table = np.arange(len(rows) * per_row, dtype=np.int32)
        self._table = table.reshape(len(rows), per_row)
        self._pages = engine.new_pages(table.size)
        self._lengths = np.array([len(prompt) for prompt in self._prompts], np.int32)
        self._is_greedy = sampling.is_greedy and not sampling.has_penalties

    def start(self) -> list[int]:
        """Read the prompts and return the first token of each row."""
        first: list[np.ndarray] = []
        waiting: list[tuple[int, int]] = []
        for row, prompt in enumerate(self._prompts):
            for position in range(len(prompt)):
                waiting.append((row, position))
                if len(waiting) == MAX_STEP_TOKENS:
                    first.append(self._read(waiting))
                    waiting = []
        if waiting:
            first.append(self._read(waiting))
        return self._choose(np.concatenate(first))

    def _read(self, places: list[tuple[int, int]]) -> np.ndarray:
        """Append tokens of prompts; return the logits of those that end one."""
        tokens = [self._prompts[row][position] for row, position in places]
        ends = [
            i for i, (row, position) in enumerate(places) if position == len(self._prompts[row]) - 1
        ]
        rows, positions = np.array(places, np.int32).T
        return self._engine.step(self._pages, tokens, positions, rows, self._table, ends)

    def step(self, tokens: list[int]) -> list[int]:
        """Append the newest token of each row and return the next ones."""
        rows = np.arange(len(tokens), dtype=np.int32)
        logits: list[np.ndarray] = []
        for start in range(0, len(tokens), MAX_STEP_TOKENS):
            part = slice(start, start + MAX_STEP_TOKENS)
            chosen = range(len(rows[part]))
            logits.append(
                self._engine.step(
                    self._pages, tokens[part], self._lengths[part], rows[part], self._table, chosen
                )
            )
        self._lengths += 1
        return self._choose(logits[0] if len(logits) == 1 else np.concatenate(logits))

    def keep(self, slots: list[int]) -> None:
        """Let the other rows leave; their pages stay until the batch ends."""
        self._choosers = [self._choosers[slot] for slot in slots]
        self._table = np.ascontiguousarray(self._table[slots])
        self._lengths = self._lengths[slots]

    def _choose(self, logits: np.ndarray) -> list[int]:
        if self._is_greedy:
            tokens = kernels().largest(logits)
            _check_finite(logits[np.arange(len(tokens)), tokens])
            return tokens
        _check_finite(logits.max(axis=1))
        return [chooser.choose(row) for chooser, row in zip(self._choosers, logits, strict=True)]


class _Chooser:
    """How one row's tokens are chosen: its random numbers, and its history where it counts."""

    def __init__(self, engine: Engine, row: RowLike, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = row_generator(sampling.seed, row.number)
        self._seen: np.ndarray | None = None
        self._counts: np.ndarray | None = None
        if sampling.has_penalties:
            self._seen = np.zeros(engine.config.vocab_size, np.uint8)
            self._seen[row.prompt] = 1
            self._counts = np.zeros(engine.config.vocab_size, np.float32)

    def choose(self, logits: np.ndarray) -> int:
        sampling = self._sampling
        token = kernels().choose(
            logits=logits,
            temperature=sampling.temperature,
            top_k=min(sampling.top_k, len(logits)),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
            seen=self._seen,
            counts=self._counts,
            uniform=0.0 if sampling.is_greedy else self._generator.random(),
        )
        if self._seen is not None and self._counts is not None:
            self._seen[token] = 1
            self._counts[token] += 1
        return token


def row_generator(seed: int | None, row: int) -> random.Random:
    """Return the source of a row's random numbers; None for one that nobody can repeat."""
    return random.Random() if seed is None else random.Random(seed + row)


def _check_finite(largest: np.ndarray) -> None:
    for row, value in enumerate(largest.tolist()):
        if not math.isfinite(value):
            step = "The weights are damaged or the dtype overflows; try dtype='float32'"
            name = f"largest logit of row {row}"
            raise BackendError(describe(name, "sampling", "finite", value, step))
