"""The choice of a request's tokens: against `generate`'s own, and what only the server has."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.ops.cpu import chosen_instruction_set, kernels
from deepseek.ops.sampling import Sampling
from deepseek.serve.generation import GenerationRequest, TokenChoice
from deepseek.serve.runtime.sampler import Sampler, describe_choice
from tests.ops.native import NEEDS_KERNELS

pytestmark = NEEDS_KERNELS

VOCAB = 50


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def sampler(ends: tuple[int, ...] = (), **settings: object) -> Sampler:
    request = GenerationRequest(**{"prompt": (1, 2), "max_tokens": 9, **settings})  # type: ignore[arg-type]
    return Sampler(request, VOCAB, ends, instruction_set=chosen_instruction_set())


def choose(asked: Sampler, logits: np.ndarray) -> TokenChoice | None:
    """Let a sampler choose from a copy of logits."""
    isa, row = chosen_instruction_set(), logits[None].copy()
    return asked.choose(row[0], kernels().largest(isa, row)[0], kernels().certainty(isa, row)[0])


def describe(logits: np.ndarray, token: int, num_top: int) -> TokenChoice:
    sure = kernels().certainty(chosen_instruction_set(), logits[None].copy())[0]
    return describe_choice(logits, token, num_top, sure)


@given(st.integers(0, 2**16), st.integers(0, 5))
def test_logprobs_are_the_log_softmax_and_the_best_come_first(seed: int, num_top: int) -> None:
    logits = logits_of(seed).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    choice = describe(logits.astype(np.float32), 7, num_top)
    assert choice.logprob == pytest.approx(expected[7], abs=1e-5)
    assert [token for token, _ in choice.top] == np.argsort(-expected)[:num_top].tolist()
    assert [value for _, value in choice.top] == pytest.approx(
        sorted(expected)[::-1][:num_top], abs=1e-5
    )


def test_equal_logits_are_listed_by_their_ids() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[9, 4, 30]] = 1
    assert [token for token, _ in describe(logits, 4, 3).top] == [4, 9, 30]


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = logits_of(3)
    plain = describe(logits, int(logits.argmax()), 2)
    asked = sampler(
        sampling=Sampling(temperature=0.5, top_k=1, repetition_penalty=1.5),
        logit_bias={int(logits.argmax()): 5.0},
        logprobs=2,
    )
    assert choose(asked, logits) == plain


def test_a_bias_moves_a_token_up_or_out() -> None:
    logits = logits_of(4)
    best = int(logits.argmax())
    up = choose(sampler(logit_bias={11: 100.0}), logits)
    assert up is not None and up.token_id == 11
    out = choose(sampler(logit_bias={best: -100.0}), logits)
    assert out is not None and out.token_id == int(np.argsort(-logits)[1])


def test_end_tokens_wait_until_enough_are_there() -> None:
    logits = logits_of(5)
    best, second = (int(token) for token in np.argsort(-logits)[:2])
    asked = sampler(ends=(best,), min_tokens=2)
    found = [choose(asked, logits) for _ in range(3)]
    assert [choice.token_id for choice in found if choice] == [second, second, best]


def test_only_what_changes_the_logits_says_so() -> None:
    assert not sampler().changes_logits
    assert not sampler(sampling=Sampling(temperature=1.0)).changes_logits
    assert sampler(logit_bias={3: 1.0}).changes_logits
    assert sampler(sampling=Sampling(presence_penalty=0.5)).changes_logits
    assert sampler(min_tokens=1).changes_logits


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_give_no_token(bad: float, temperature: float) -> None:
    logits = logits_of(7)
    logits[13] = bad
    assert choose(sampler(sampling=Sampling(temperature=temperature)), logits) is None


@settings(deadline=None)
@given(st.integers(0, 2**16), st.floats(0.2, 2), st.integers(0, 9), st.floats(0.3, 1))
def test_a_seed_gives_the_same_tokens_and_one_number_each(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    """Any start of the answer is the same, so guesses that are taken back change nothing."""
    chosen = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    rows = [logits_of(seed + place) for place in range(6)]
    whole = [choose(sampler(sampling=chosen), rows[0])]
    again = sampler(sampling=chosen)
    found = [choose(again, row) for row in rows]
    assert found[:1] == whole
    third = sampler(sampling=chosen)
    assert [choose(third, row) for row in rows] == found


def test_draws_follow_the_softmax() -> None:
    """A chi-square test at 4 sigma over 8 tokens."""
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[:8] = np.linspace(-1, 1, 8)
    asked = sampler(sampling=Sampling(temperature=1.0, seed=1))
    count = 4000
    found = np.bincount([choose(asked, logits).token_id for _ in range(count)], minlength=8)  # type: ignore[union-attr]
    expected = np.exp(logits[:8]) / np.exp(logits[:8]).sum() * count
    chi = float(((found[:8] - expected) ** 2 / expected).sum())
    assert found[8:].sum() == 0
    assert chi < 7 + 4 * math.sqrt(14)
