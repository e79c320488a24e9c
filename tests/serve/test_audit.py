"""Answers that are read again: the divergence is that of two passes, and faults show."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.serve.audit import MOST_WAITING, NUM_TOP, Auditor, AuditResult, divergence
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.generation import GenerationRequest, Output, TokenChoice
from deepseek.serve.runtime.engine_executor import EngineExecutor
from deepseek.serve.service import Service
from tests.ops.native import NEEDS_KERNELS
from tests.serve.engines import tiny_engine

PROMPT = tuple(b"once upon a time there was a model that was read again, twice " * 3)


def top_of(logits: np.ndarray, count: int) -> TokenChoice:
    logprobs = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-logprobs)[:count]
    return TokenChoice(int(best[0]), top=tuple((int(i), float(logprobs[i])) for i in best))


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 40), st.floats(0, 3))
def test_the_divergence_is_a_lower_bound_and_exact_for_all_tokens(
    seed: int, count: int, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    ours = rng.normal(0, 3, 40)
    theirs = ours + rng.normal(0, noise, 40)
    p, q = (np.exp(each) / np.exp(each).sum() for each in (ours, theirs))
    exact = float((p * np.log(p / q)).sum())
    found = divergence(top_of(ours, count), theirs.astype(np.float32))
    assert found <= exact + 1e-5
    assert divergence(top_of(ours, 40), theirs) == pytest.approx(exact, abs=1e-5)


def serve(
    auditor_every: int, spoil: float = 0.0, answers: int = 4
) -> tuple[list[AuditResult], list[Output]]:
    """Return the audits of some answers by an engine whose logprobs are off by `spoil`."""
    results: list[AuditResult] = []

    async def body() -> list[Output]:
        engine = tiny_engine()
        executor = EngineExecutor(engine, 64)
        auditor = Auditor(engine, auditor_every, results.append)
        config = SchedulerConfig(context=executor.context, max_step_tokens=32)
        scheduler = Scheduler(config, PagePool(64, executor.page_size))
        assert engine.tokenizer is not None
        vocab_size = engine.config.vocab_size
        service = Service(
            scheduler, executor, tokenizer=engine.tokenizer, vocab_size=vocab_size, auditor=auditor
        )
        if spoil:
            step = engine.step

            def bad_step(pages: object, *rest: object) -> np.ndarray:
                logits = step(pages, *rest)  # type: ignore[arg-type]
                if pages is executor._pages:
                    logits[:, ::2] += spoil
                return logits

            object.__setattr__(engine, "step", bad_step)
        outputs: list[Output] = []
        try:
            await service.start()
            wanted = GenerationRequest(prompt=PROMPT, max_tokens=30, ignore_eos=True, logprobs=2)
            for _ in range(answers):
                outputs += [output async for output in service.generate(wanted)]
            while auditor._waiting:
                await asyncio.sleep(0.001)
            await service.stop()
        finally:
            if spoil:
                object.__delattr__(engine, "step")
        return outputs

    return results, asyncio.run(asyncio.wait_for(body(), 60))


@NEEDS_KERNELS
def test_a_sound_engine_says_the_same_again_and_clients_see_nothing_of_it() -> None:
    results, outputs = serve(2)
    assert len(results) == 2
    for result in results:
        assert result.num_tokens == 30 and result.agreement == 1
        assert result.kl < 1e-6 and result.worst_kl < 1e-6
    assert all(len(choice.top) == 2 for output in outputs for choice in output.tokens)


@NEEDS_KERNELS
def test_an_engine_that_says_something_else_is_found_out() -> None:
    results, _ = serve(1, spoil=1.5)
    assert all(result.kl > 0.05 and result.agreement < 1 for result in results)


@NEEDS_KERNELS
def test_of_too_many_answers_the_oldest_are_dropped() -> None:
    auditor = Auditor(tiny_engine(), 1, lambda result: None)
    choice = TokenChoice(1, top=tuple((token, -math.log(NUM_TOP)) for token in range(NUM_TOP)))
    for _ in range(MOST_WAITING + 3):
        auditor.take(PROMPT, [choice])
    assert auditor.num_dropped == 3
    while auditor.advance():
        pass
    assert not auditor.advance()
