"""Answers of the whole engine: what `generate` gives alone, whatever else runs beside."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest

from deepseek.errors import ConfigError
from deepseek.generate import generate
from deepseek.ops.routing import Routing
from deepseek.ops.sampling import Sampling
from deepseek.serve.core.drafting import Drafter, PromptLookup
from deepseek.serve.core.ledger import check
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.executor import Result
from deepseek.serve.generation import DeadlineError, EngineError, GenerationRequest, Grammar, Output
from deepseek.serve.runtime.engine_executor import EngineExecutor
from deepseek.serve.runtime.grammar import Grammars
from deepseek.serve.runtime.model_drafter import ModelDrafter
from deepseek.serve.service import Service
from tests.ops.native import NEEDS_KERNELS
from tests.serve.engines import tiny_engine

pytestmark = NEEDS_KERNELS

TEXTS = [
    "What is",
    "The cat sat on the mat. The cat sat on",
    "a" * 70,
    "x",
    "once upon a time " * 12,
]


@dataclasses.dataclass
class Running:
    """A service under test, with what a test looks at."""

    service: Service
    scheduler: Scheduler
    executor: EngineExecutor


@asynccontextmanager
async def running(
    *,
    pages: int = 64,
    max_running: int = 8,
    step_tokens: int = 64,
    drafts: Literal["none", "text", "model"] = "none",
    dies: bool = False,
) -> AsyncIterator[Running]:
    """Run a service on the tiny engine; at the end no page may be missing."""
    engine = tiny_engine()
    executor = EngineExecutor(engine, pages)
    config = SchedulerConfig(
        context=executor.context, max_running=max_running, max_step_tokens=step_tokens
    )
    pool = PagePool(pages, executor.page_size, least_copied=executor.least_copied)
    vocab_size = engine.config.vocab_size
    drafters: dict[str, Callable[[], Drafter]] = {
        "text": PromptLookup,
        "model": lambda: ModelDrafter(tiny_engine(), executor.context, vocab_size),
    }
    scheduler = Scheduler(config, pool, drafters[drafts]() if drafts != "none" else None)
    # how many guesses pay depends on the time that steps take; here some are always made
    scheduler._control.most = lambda *_: 3  # type: ignore[method-assign]
    assert engine.tokenizer is not None
    service = Service(
        scheduler,
        executor,
        tokenizer=engine.tokenizer,
        vocab_size=engine.config.vocab_size,
        compile_grammar=Grammars(engine.tokenizer, engine.config.vocab_size).matcher,
        on_step=lambda step, seconds: check(scheduler),
    )
    await service.start()
    try:
        yield Running(service, scheduler, executor)
    finally:
        await service.stop(drains=False)
        assert isinstance(service.engine.death, EngineError) or dies


def request(text: str, **settings: object) -> GenerationRequest:
    tokenizer = tiny_engine().tokenizer
    assert tokenizer is not None
    values = {"prompt": tuple(tokenizer.encode(text)), "max_tokens": 40, **settings}
    return GenerationRequest(**values)  # type: ignore[arg-type]


async def collect(service: Service, wanted: GenerationRequest) -> list[Output]:
    return [output async for output in service.generate(wanted)]


def tokens_of(outputs: list[Output]) -> list[int]:
    return [choice.token_id for output in outputs for choice in output.tokens]


def alone(wanted: GenerationRequest) -> tuple[str, list[int], str]:
    """Return what `generate` says on the same engine."""
    found = generate(
        tiny_engine(),
        list(wanted.prompt),
        max_tokens=wanted.max_tokens,
        sampling=wanted.sampling,
        stop=wanted.stop,
        ignore_eos=wanted.ignore_eos,
    )
    assert not isinstance(found, list)
    return found.text, list(found.token_ids), found.finish_reason


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


@pytest.mark.parametrize("drafts", ["none", "text", "model"])
@pytest.mark.parametrize("pages", [64, 13])
def test_answers_are_those_of_generate_whatever_runs_beside(pages: int, drafts: Any) -> None:
    """Greedy and drawn, in chunks, with the cache, with guesses, and with so few pages that
    requests are turned back."""
    wanted = [
        request(text, sampling=Sampling(temperature=temperature, seed=seed), ignore_eos=True)
        for seed, text in enumerate(TEXTS)
        for temperature in (0.0, 0.9)
    ]
    wanted += [request(TEXTS[4], max_tokens=100, stop=("e", "ab")), request(TEXTS[1])]

    async def body() -> None:
        async with running(pages=pages, drafts=drafts) as server:
            for _ in range(2):  # the second time every prompt is in the cache
                random.Random(pages).shuffle(wanted)
                found = await asyncio.gather(*(collect(server.service, one) for one in wanted))
                for one, outputs in zip(wanted, found, strict=True):
                    text, ids, reason = alone(one)
                    assert tokens_of(outputs) == ids
                    assert "".join(output.text for output in outputs) == text
                    assert outputs[-1].finish_reason == reason
            assert server.scheduler.pool.num_free == server.scheduler.pool.num_pages
            assert server.scheduler.counters.cached_tokens > 0
            if drafts != "none":
                assert server.scheduler.counters.accepted_tokens > 0

    run(body)


def test_answers_behind_copied_pages_are_those_of_generate() -> None:
    """Prompts that leave an earlier one within a page, at its start, in its middle and at its end,
    one after another and together."""
    common = "it was the best of times, it was the worst of times, it was the age of wisdom, it was"
    first = request(common + " an age", ignore_eos=True)
    others = [request(common[:at] + "Then?" * 4, ignore_eos=True) for at in (20, 61, 63, 64, 70)]

    async def body() -> None:
        async with running() as server:
            await collect(server.service, first)
            found = await asyncio.gather(*(collect(server.service, each) for each in others))
            for each, outputs in zip(others, found, strict=True):
                assert tokens_of(outputs) == alone(each)[1]
            assert server.scheduler.counters.cached_tokens >= 20 + 61 + 63 + 64 + 64

    run(body)


def test_pages_of_routed_attention_are_not_copied() -> None:
    """With a page is kept what its groups of queries chose, which belongs to all of its tokens."""
    routed = dataclasses.replace(tiny_engine(), routing=Routing())
    assert EngineExecutor(routed, 4).least_copied is None
    assert EngineExecutor(tiny_engine(), 4).least_copied is not None


def test_logprobs_of_prompt_and_answer_are_those_of_one_pass() -> None:
    """The prompt's logprobs are the same in chunks, and what the model says of its own answer is
    what it said while it wrote it."""

    async def body() -> None:
        async with running(step_tokens=16) as server:
            first = request(TEXTS[1], logprobs=3, prompt_logprobs=2, max_tokens=20, ignore_eos=True)
            outputs = await collect(server.service, first)
            answer = [choice for output in outputs for choice in output.tokens]
            whole = (*first.prompt, *tokens_of(outputs))
            again = await collect(
                server.service,
                GenerationRequest(prompt=whole, max_tokens=1, prompt_logprobs=3),
            )
            seen = again[0].prompt_logprobs
            assert seen is not None and [choice.token_id for choice in seen] == list(whole)
            assert seen[0].logprob is None
            assert list(seen[len(first.prompt) :]) == answer
            early = outputs[0].prompt_logprobs
            assert early is not None and len(early) == len(first.prompt)
            assert [choice.logprob for choice in early] == [
                choice.logprob for choice in seen[: len(first.prompt)]
            ]
            assert all(len(choice.top) == 2 for choice in early[1:])

    run(body)


@pytest.mark.parametrize("length", [62, 63, 64, 65, 66, 127, 128, 129])
def test_prompt_logprobs_are_there_wherever_a_step_ends(length: int) -> None:
    """Steps of 64 tokens: one may leave the last token of a prompt alone, when all the rest is
    read and nothing can be chosen yet."""
    wanted = dataclasses.replace(request("a"), prompt=(97,) * length, prompt_logprobs=0)

    async def body() -> None:
        async with running(step_tokens=64) as server:
            outputs = await collect(server.service, wanted)
            (prompt,) = [each.prompt_logprobs for each in outputs if each.prompt_logprobs]
            assert len(prompt) == length

    run(body)


def test_a_prompt_of_one_token_has_prompt_logprobs_too() -> None:
    async def body() -> None:
        async with running() as server:
            outputs = await collect(server.service, request("x", prompt_logprobs=1, max_tokens=1))
            assert outputs[0].prompt_logprobs is not None
            assert [choice.logprob for choice in outputs[0].prompt_logprobs] == [None]

    run(body)


def test_a_grammar_is_followed_beside_answers_without_one() -> None:
    async def body() -> None:
        async with running(drafts="text") as server:
            form = Grammar(kind="regex", text="(yes|no)+, [0-9]{3}")
            free, bound = await asyncio.gather(
                collect(server.service, request(TEXTS[0])),
                collect(server.service, request(TEXTS[0], grammar=form, max_tokens=200)),
            )
            text = "".join(output.text for output in bound)
            assert text[-5:-3] == ", " and text[-3:].isdigit()
            assert bound[-1].finish_reason == "stop"
            assert tokens_of(free) == alone(request(TEXTS[0]))[1]
            with pytest.raises(ConfigError):
                await collect(
                    server.service, request("x", grammar=Grammar(kind="regex", text="(?=a)"))
                )

    run(body)


def test_closing_the_iterator_gives_everything_back() -> None:
    async def body() -> None:
        async with running() as server:
            stream = server.service.generate(request(TEXTS[4], max_tokens=400, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()
            await collect(server.service, request("x", max_tokens=3))
            assert server.scheduler.num_running == 0
            assert server.scheduler.pool.num_free == server.scheduler.pool.num_pages
            assert not server.executor._open

    run(body)


def test_a_deadline_that_passes_ends_the_answer() -> None:
    async def body() -> None:
        async with running() as server:
            wanted = request(TEXTS[0], max_tokens=500, ignore_eos=True, deadline_s=0.005)
            with pytest.raises(DeadlineError):
                await collect(server.service, wanted)
            assert server.scheduler.pool.num_free == server.scheduler.pool.num_pages

    run(body)


def test_attack_26_numbers_that_are_not_finite_end_the_answer_and_leave_the_cache() -> None:
    async def body() -> None:
        async with running() as server:
            execute = server.executor.execute
            poisoned = request("poison " * 20, max_tokens=9)

            def bad(work: object, copies: object = ()) -> list[Result]:
                results = execute(work, copies)  # type: ignore[arg-type]
                return [
                    Result((), is_finite=False)
                    if item.is_choosing and item.request.prompt == poisoned.prompt
                    else result
                    for item, result in zip(work, results, strict=True)  # type: ignore[call-overload]
                ]

            server.executor.execute = bad  # type: ignore[method-assign]
            outputs, good = await asyncio.gather(
                collect(server.service, poisoned), collect(server.service, request(TEXTS[1]))
            )
            assert outputs[-1].finish_reason == "error" and not tokens_of(outputs)
            assert tokens_of(good) == alone(request(TEXTS[1]))[1]
            server.executor.execute = execute  # type: ignore[method-assign]
            again = await collect(server.service, poisoned)
            assert again[-1].num_cached_tokens == 0
            assert tokens_of(again) == alone(poisoned)[1]

    run(body)


def test_attack_31_a_dead_engine_tells_everybody() -> None:
    async def body() -> None:
        deaths: list[BaseException] = []
        async with running(dies=True) as server:
            server.service.on_death = deaths.append
            server.executor.execute = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
            with pytest.raises(EngineError):
                await collect(server.service, request(TEXTS[0]))
            with pytest.raises(EngineError):
                await collect(server.service, request(TEXTS[0]))
            assert not server.service.is_ready()
            await server.service.stop()
            await asyncio.sleep(0)
            assert [type(error) for error in deaths] == [ZeroDivisionError]

    run(body)


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    async def body() -> None:
        async with running() as server:
            wanted = request(TEXTS[0], max_tokens=60, ignore_eos=True)
            answer = asyncio.create_task(collect(server.service, wanted))
            await asyncio.sleep(0.01)
            stopping = asyncio.create_task(server.service.stop(drains=True))
            await asyncio.sleep(0)
            assert len(tokens_of(await answer)) == 60
            await stopping
            with pytest.raises(EngineError):
                await collect(server.service, wanted)

    run(body)
