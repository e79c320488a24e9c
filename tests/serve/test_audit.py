"""Answers that are read again: the divergence is that of two passes, and faults show."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.generate import Engine
from deepseek.generate.adapters import NO_ADAPTER
from deepseek.serve.adapters import AdapterRegistry
from deepseek.serve.audit import MOST_WAITING, NUM_TOP, Auditor, AuditResult, divergence
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.generation import GenerationRequest, Output, TokenChoice
from deepseek.serve.runtime.engine_executor import EngineExecutor
from deepseek.serve.service import Service
from tests.ops.native import NEEDS_KERNELS
from tests.serve.adapter_files import write_adapter
from tests.serve.engines import fresh_engine, tiny_engine

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
    auditor_every: int,
    spoil: float = 0.0,
    answers: int = 4,
    registry: AdapterRegistry | None = None,
) -> tuple[list[AuditResult], list[Output]]:
    """Return the audits of some answers by an engine whose logprobs are off by `spoil`; where there
    is a registry, answers by its adapter `one`."""
    results: list[AuditResult] = []

    async def body() -> list[Output]:
        engine = tiny_engine() if registry is None else registry._engines[0]
        executor = EngineExecutor(engine, 64)
        auditor = Auditor(engine, auditor_every, results.append)
        config = SchedulerConfig(context=executor.context, max_step_tokens=32)
        scheduler = Scheduler(config, PagePool(64, executor.page_size))
        assert engine.tokenizer is not None
        vocab_size = engine.config.vocab_size
        service = Service(
            scheduler,
            executor,
            tokenizer=engine.tokenizer,
            vocab_size=vocab_size,
            auditor=auditor,
            resolve_adapter=None if registry is None else registry.resolve,
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
            adapter = None if registry is None else "one"
            wanted = GenerationRequest(
                prompt=PROMPT, max_tokens=30, ignore_eos=True, logprobs=2, adapter=adapter
            )
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


@dataclasses.dataclass
class Adapted:
    """An engine with adapters, and one that audits it."""

    engine: Engine
    reference: Engine
    registry: AdapterRegistry


def adapted(folder: Path) -> Adapted:
    engine, reference = fresh_engine(), fresh_engine()
    registry = AdapterRegistry(engine, reference)
    for seed, name in enumerate(("one", "two")):
        registry.register(name, write_adapter(folder / name, seed))
        registry.load(name)
    return Adapted(engine, reference, registry)


def answer_of(engine: Engine, adapter: str, computed_by: str | None) -> list[TokenChoice]:
    """Return an answer to an adapter's request, computed by another one's weights or by none."""
    pages, table = engine.new_pages(4), np.arange(4, dtype=np.int32)[None]
    number = NO_ADAPTER if computed_by is None else engine.adapters[computed_by].number
    tokens, choices = list(PROMPT), []
    start = 0
    for _ in range(20):
        part = tokens[start:]
        places = np.arange(start, len(tokens))
        rows, numbers = np.zeros(len(part)), np.full(len(part), number)
        logits = engine.step(pages, part, places, rows, table, [len(part) - 1], numbers)
        choices.append(top_of(logits[0].astype(np.float64), NUM_TOP))
        start = len(tokens)
        tokens.append(choices[-1].token_id)
    return choices


@NEEDS_KERNELS
@pytest.mark.parametrize("has_own_reference", [False, True])
@pytest.mark.parametrize("computed_by", ["one", "two", None])
def test_an_answer_by_another_adapter_or_by_none_is_found_out(
    tmp_path: Path, has_own_reference: bool, computed_by: str | None
) -> None:
    made = adapted(tmp_path)
    results: list[AuditResult] = []
    audits = made.reference if has_own_reference else made.engine
    auditor = Auditor(audits, 1, results.append)
    asked = made.registry.resolve("one")
    by = None if computed_by is None else made.registry.resolve(computed_by)
    auditor.take(PROMPT, answer_of(made.engine, asked, by), asked)
    while auditor.advance():
        pass
    (result,) = results
    if computed_by == "one":
        assert result.agreement == 1 and result.worst_kl < 1e-6
    else:
        assert result.kl > 0.05


@NEEDS_KERNELS
def test_an_adapter_is_held_for_the_audit_and_missed_where_it_was_gone(tmp_path: Path) -> None:
    made = adapted(tmp_path)
    results: list[AuditResult] = []
    auditor = Auditor(made.reference, 1, results.append)
    one, two = made.registry.resolve("one"), made.registry.resolve("two")
    answer = answer_of(made.engine, one, one)
    auditor.take(PROMPT, answer, one)
    made.registry.drop("one")
    made.registry.drop("two")
    auditor.take(PROMPT, answer, two)
    assert auditor.num_dropped == 1
    while auditor.advance():
        pass
    assert [result.agreement for result in results] == [1]
    assert made.reference.adapter_bytes == made.engine.adapter_bytes == 0


@NEEDS_KERNELS
@pytest.mark.parametrize("tampers", [False, True])
def test_an_adapter_that_is_tampered_with_while_it_serves_is_found_out(
    tmp_path: Path, tampers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapted(tmp_path)
    if tampers:
        two = made.engine.adapters[made.registry.resolve("two")]
        monkeypatch.setattr(
            EngineExecutor, "_adapters", lambda self, work, counts: np.full(sum(counts), two.number)
        )
    results, _ = serve(2, registry=made.registry)
    assert len(results) == 2 and all(result.num_tokens == 30 for result in results)
    for result in results:
        assert (result.kl > 0.05) == tampers and (result.agreement == 1) != tampers
