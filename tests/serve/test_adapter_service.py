"""Adapters under the whole engine: named by requests, cached apart, dropped in the middle."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.generate.modules import engine_of
from deepseek.models import Decoder
from deepseek.serve.adapters import AdapterRegistry
from deepseek.serve.core.ledger import check
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.generation import EngineError, GenerationRequest, Output
from deepseek.serve.runtime.engine_executor import EngineExecutor
from deepseek.serve.service import Service
from tests.generate.conftest import TINY, byte_tokenizer
from tests.ops.native import NEEDS_KERNELS
from tests.serve.adapter_files import write_adapter

pytestmark = NEEDS_KERNELS

PROMPT = tuple(ord(each) for each in "once upon a time " * 8)
PAGES = 40


@dataclasses.dataclass
class Running:
    """A service under test, with what a test looks at."""

    service: Service
    scheduler: Scheduler
    registry: AdapterRegistry


@asynccontextmanager
async def running(folder: Path, *, has_adapters: bool = True) -> AsyncIterator[Running]:
    """Run a service on an engine of its own; at the end no page may be missing and no adapter be
    held."""
    torch.manual_seed(1)
    model = Decoder(TINY).eval()
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    engine = engine_of(model)
    assert engine is not None and engine.tokenizer is not None
    registry = AdapterRegistry(engine)
    for seed, name in enumerate(("one", "two")):
        registry.register(name, write_adapter(folder / name, seed))
        registry.load(name)
    executor = EngineExecutor(engine, PAGES)
    config = SchedulerConfig(context=executor.context, max_running=8, max_step_tokens=64)
    scheduler = Scheduler(config, PagePool(PAGES, executor.page_size), None)
    service = Service(
        scheduler,
        executor,
        tokenizer=engine.tokenizer,
        vocab_size=engine.config.vocab_size,
        resolve_adapter=registry.resolve if has_adapters else None,
        on_step=lambda step, seconds: check(scheduler),
    )
    await service.start()
    try:
        yield Running(service, scheduler, registry)
    finally:
        await service.stop(drains=True)
        assert isinstance(service.engine.death, EngineError)
        assert scheduler.pool.num_free == PAGES
        for adapter in registry.loaded():
            registry.drop(adapter.name)
        assert engine.adapter_bytes == 0


def request(adapter: str | None, max_tokens: int = 20) -> GenerationRequest:
    return GenerationRequest(prompt=PROMPT, max_tokens=max_tokens, ignore_eos=True, adapter=adapter)


async def collect(service: Service, wanted: GenerationRequest) -> list[Output]:
    return [output async for output in service.generate(wanted)]


def tokens_of(outputs: list[Output]) -> list[int]:
    return [choice.token_id for output in outputs for choice in output.tokens]


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


def test_each_is_cached_apart_and_answers_as_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path) as server:
            names = [None, "one", "two"]
            first = [await collect(server.service, request(name)) for name in names]
            assert [outputs[-1].num_cached_tokens for outputs in first] == [0, 0, 0]
            assert len({tuple(tokens_of(outputs)) for outputs in first}) == 3
            again = await asyncio.gather(
                *(collect(server.service, request(name)) for name in names * 2)
            )
            for place, outputs in enumerate(again):
                assert tokens_of(outputs) == tokens_of(first[place % 3])
                assert outputs[-1].num_cached_tokens == 128

    run(body)


def test_new_files_under_an_old_name_find_no_pages_of_the_old(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path) as server:
            old = await collect(server.service, request("one"))
            server.registry.drop("one")
            write_adapter(tmp_path / "one", 9)
            server.registry.load("one")
            new = await collect(server.service, request("one"))
            assert new[-1].num_cached_tokens == 0
            assert tokens_of(new) != tokens_of(old)
            server.registry.drop("one")
            write_adapter(tmp_path / "one", 0)
            server.registry.load("one")
            back = await collect(server.service, request("one"))
            assert back[-1].num_cached_tokens == 128
            assert tokens_of(back) == tokens_of(old)

    run(body)


def test_dropped_in_the_middle_an_answer_is_finished(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path) as server:
            expected = tokens_of(await collect(server.service, request("one", 60)))
            found: list[Output] = []
            async for output in server.service.generate(request("one", 60)):
                found.append(output)
                if len(found) == 5:
                    server.registry.drop("one")
                    with pytest.raises(ConfigError, match="one that is loaded"):
                        await collect(server.service, request("one"))
            assert tokens_of(found) == expected

    run(body)


def test_unknown_adapters_are_an_error_and_the_engine_lives_on(tmp_path: Path) -> None:
    """Also one that was dropped between the look at its name and the engine's."""

    async def body() -> None:
        async with running(tmp_path) as server:
            for name in ("three", "../one", "one@0", ""):
                with pytest.raises(ConfigError):
                    await collect(server.service, request(name))
            known = server.registry.resolve("one")
            server.registry.drop("one")
            server.service._resolve_adapter = lambda name: known
            with pytest.raises(ConfigError, match="dropped"):
                await collect(server.service, request("one"))
            assert server.service.is_ready()
            assert len(tokens_of(await collect(server.service, request(None)))) == 20

    run(body)


def test_a_service_without_adapters_refuses_their_names(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path, has_adapters=False) as server:
            with pytest.raises(ConfigError, match="no adapters"):
                await collect(server.service, request("one"))

    run(body)
