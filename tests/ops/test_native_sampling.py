"""The choice of tokens in C++ is the choice of the specification."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from deepseek.ops.cpu import kernels
from deepseek.ops.sampling import Sampling, TokenHistory, reference
from tests.ops.native import NEEDS_KERNELS
from tests.ops.test_sampling import PENALTIES, SETTINGS

pytestmark = NEEDS_KERNELS

ROWS, VOCABULARY = 40, 1999


def native(
    logits: torch.Tensor, sampling: Sampling, seed: int, history: TokenHistory | None
) -> list[int]:
    """Return the kernel's choice for each row."""
    chosen = []
    for row, values in enumerate(logits.numpy().copy()):
        chosen.append(
            kernels().choose(
                logits=values,
                temperature=sampling.temperature,
                top_k=min(sampling.top_k, VOCABULARY),
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition=sampling.repetition_penalty,
                frequency=sampling.frequency_penalty,
                presence=sampling.presence_penalty,
                seen=None if history is None else history.seen[row].numpy().astype(np.uint8),
                counts=None if history is None else history.counts[row].numpy(),
                uniform=random.Random(seed + row).random(),
            )
        )
    return chosen


@pytest.mark.parametrize("scale", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("name", [*SETTINGS, *PENALTIES])
def test_choices_are_the_specification(name: str, scale: float) -> None:
    sampling = {**SETTINGS, **PENALTIES}[name]
    generator = torch.Generator().manual_seed(len(name))
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * scale
    history = None
    if sampling.has_penalties:
        prompts = torch.randint(0, VOCABULARY, (ROWS, 300), generator=generator)
        history = TokenHistory.of_prompts(prompts.tolist(), VOCABULARY)
        for _ in range(50):
            history.add(torch.randint(0, VOCABULARY, (ROWS,), generator=generator))
    generators = [random.Random(7 + row) for row in range(ROWS)]
    expected = reference.choose(logits, sampling, generators, history).tolist()
    found = native(logits, sampling, 7, history)
    # a float32 sum of the filters may round a border or a draw the other way, rarely
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


def test_equal_logits_give_the_first() -> None:
    logits = np.zeros((3, 50), np.float32)
    logits[1, 7] = logits[1, 9] = 2
    logits[2] = -np.inf
    logits[2, 49] = -5
    assert kernels().largest(logits) == [0, 7, 49]


def test_a_number_that_is_none_counts_as_largest() -> None:
    logits = np.zeros((1, 50), np.float32)
    logits[0, 20], logits[0, 3] = math.nan, 9
    assert kernels().largest(logits) == [20]


def test_arrays_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        kernels().choose(
            logits=np.zeros(5, np.float32),
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repetition=1.0,
            frequency=0.0,
            presence=0.0,
            seen=np.zeros(4, np.uint8),
            counts=None,
            uniform=0.5,
        )
