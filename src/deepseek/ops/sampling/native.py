"""Choosing the tokens of one row by the kernels, for logits of the flat step. Loads no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from deepseek.ops.cpu import kernels
from deepseek.ops.sampling.config import Sampling


class RowChooser:
    """How one row's tokens are chosen: its random numbers, and its history where it counts.

    Args:
        sampling: how to choose.
        prompt: ids of the row's prompt, which the repetition penalty counts.
        vocab_size: of the logits.
        generator: gives one number for each token that is drawn.
        instruction_set: whose kernels choose.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        generator: random.Random,
        *,
        instruction_set: str,
    ) -> None:
        self._sampling, self._generator, self._isa = sampling, generator, instruction_set
        self._seen: np.ndarray | None = None
        self._counts: np.ndarray | None = None
        if sampling.has_penalties:
            self._seen = np.zeros(vocab_size, np.uint8)
            self._seen[list(prompt)] = 1
            self._counts = np.zeros(vocab_size, np.float32)

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token of logits, float32 [V], that are finite somewhere."""
        sampling = self._sampling
        return kernels().choose(
            isa=self._isa,
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

    def take(self, token: int) -> None:
        """Count a token that was chosen, here or elsewhere."""
        if self._seen is not None and self._counts is not None:
            self._seen[token] = 1
            self._counts[token] += 1
