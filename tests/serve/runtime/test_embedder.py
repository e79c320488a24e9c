"""Vectors of texts by an encoder, and by the decoder that answers."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from deepseek.errors import ConfigError
from deepseek.generate import Pooler
from deepseek.generate.encoder_modules import encoder_engine_of
from deepseek.serve.generation import EngineError
from deepseek.serve.runtime.embedder import DecoderEmbedder, EncoderEmbedder
from tests.generate.encoders import tiny_encoder
from tests.ops.native import NEEDS_KERNELS
from tests.serve.engines import tiny_engine
from tests.serve.test_service import collect, request, run, running

pytestmark = NEEDS_KERNELS

TEXTS = ["a cat", "a text of some length " * 20, "dog"]


def test_an_encoder_embeds_on_its_own_thread() -> None:
    engine = encoder_engine_of(tiny_encoder(max_embed_tokens=50))
    embedder = EncoderEmbedder(engine, "vectors")
    found = asyncio.run(embedder.embed(TEXTS))
    assert np.array_equal(np.array(found.vectors, np.float32), engine.embed(TEXTS))
    assert found.num_tokens == (5 + 2) + 50 + (3 + 2)
    assert (embedder.dimensions, embedder.max_tokens) == (40, 50)
    with pytest.raises(ConfigError, match="ids below"):
        embedder.text_of([10_000])
    embedder.close()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_decoder_embeds_between_its_steps(pooling: str) -> None:
    """The vectors are those of the engine alone, and the answers beside them too."""
    wanted = request("The cat sat on", ignore_eos=True)

    async def body() -> None:
        async with running() as server:
            call = server.service.engine.call
            embedder = DecoderEmbedder(tiny_engine(), "model", call, pooling=pooling)
            before = await collect(server.service, wanted)
            answers = [collect(server.service, wanted) for _ in range(4)]
            vectors = [embedder.embed(TEXTS) for _ in range(3)]
            *said, one, two, three = await asyncio.gather(*answers, *vectors)
            assert all(each == before for each in said)
            assert one == two == three
            alone = Pooler(tiny_engine(), pooling=pooling).embed(TEXTS)
            np.testing.assert_allclose(one.vectors, alone, atol=1e-5)
            assert one.num_tokens == sum(map(len, TEXTS))

    run(body)


def test_calls_run_on_the_engines_thread() -> None:
    def fails() -> None:
        raise ConfigError("no")

    async def body() -> None:
        async with running() as server:
            engine = server.service.engine
            name = await asyncio.wrap_future(engine.call(lambda: threading.current_thread().name))
            assert name == "engine"
            with pytest.raises(ConfigError, match="no"):
                await asyncio.wrap_future(engine.call(fails))
            assert await collect(server.service, request("x", max_tokens=2))
        with pytest.raises(EngineError):
            engine.call(fails)

    run(body)


def test_a_call_that_waits_when_the_engine_ends_is_told() -> None:
    async def body() -> None:
        begun, goes = threading.Event(), threading.Event()

        def waits() -> None:
            begun.set()
            goes.wait(10)

        async with running() as server:
            first, second = server.service.engine.call(waits), server.service.engine.call(int)
            assert await asyncio.to_thread(begun.wait, 10)
            server.service.engine.abort()
            goes.set()
            await asyncio.wrap_future(first)
            with pytest.raises(EngineError, match="ended"):
                await asyncio.wrap_future(second)

    run(body)
