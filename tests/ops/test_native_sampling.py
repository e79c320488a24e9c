"""The choice of tokens in C++ is the choice of the specification."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from deepseek.ops.cpu import kernels
from deepseek.ops.sampling import Sampling, TokenHistory, reference
from tests.ops.native import ISAS, NEEDS_KERNELS
from tests.ops.test_sampling import PENALTIES, SETTINGS

pytestmark = NEEDS_KERNELS

ROWS, VOCABULARY = 40, 1999


def native(
    isa: str, logits: torch.Tensor, sampling: Sampling, seed: int, history: TokenHistory | None
) -> list[int]:
    """Return the kernel's choice for each row."""
    chosen = []
    for row, values in enumerate(logits.numpy().copy()):
        chosen.append(
            kernels().choose(
                isa=isa,
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("name", [*SETTINGS, *PENALTIES])
def test_choices_are_the_specification(name: str, scale: float, isa: str) -> None:
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
    found = native(isa, logits, sampling, 7, history)
    # a float32 sum of the filters may round a border or a draw the other way, rarely
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 15, 16, 50, 255, 256, 257, 1999])
def test_the_largest_is_the_first_of_equal_ones_and_no_number_counts_as_largest(
    isa: str, count: int
) -> None:
    rng = np.random.default_rng(count)
    rows = [np.zeros(count), rng.normal(0, 1, count), np.full(count, -np.inf)]
    rows += [np.full(count, -np.inf) for _ in range(2)]
    rows[3][count - 1] = -5
    bad = [row.copy() for row in rows[:3]]
    for row in bad:
        row[count // 2 :] = math.nan
    table = np.array(rows + bad, np.float32)
    expected = [int(row.argmax()) for row in table]
    assert kernels().largest(isa, table) == expected


@pytest.mark.parametrize("isa", ISAS)
def test_what_a_grammar_forbids_is_never_drawn(isa: str) -> None:
    """Even where the random number is 0, or as near to 1 as one can be."""
    logits = np.full(300, -np.inf, np.float32)
    logits[[7, 290]] = 0, 1
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (0, 0.99999, 0.0), (299, 1.0, 0.0), (0, 1.0, 1e-9)]:
        found = {
            kernels().choose(
                isa=isa,
                logits=logits.copy(),
                temperature=1.0,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition=1.0,
                frequency=0.0,
                presence=0.0,
                seen=None,
                counts=None,
                uniform=uniform,
            )
            for uniform in (0.0, 1 - 2**-53)
        }
        assert found == {7, 290}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 17, 256, 1999])
def test_certainty_is_log_sum_and_entropy(isa: str, count: int) -> None:
    logits = np.random.default_rng(count).normal(0, 4, (5, count)).astype(np.float32)
    logits[1, count // 2 :] = -np.inf if count > 1 else 3
    exact = torch.from_numpy(logits).double()
    log_sums = exact.logsumexp(1)
    entropies = torch.distributions.Categorical(logits=exact).entropy()
    found = torch.tensor(kernels().certainty(isa, logits), dtype=torch.float64)
    torch.testing.assert_close(found[:, 0], log_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 1], entropies.nan_to_num(0), rtol=1e-4, atol=1e-5)


def test_arrays_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        kernels().choose(
            isa=ISAS[0],
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
