"""Vectors of texts: by an encoder on a thread of its own, or by the decoder that answers, between
its steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError, describe
from deepseek.generate import EncoderEngine, Engine, Pooler
from deepseek.generate.pooler import MOST_TOKENS, Pooling, parts
from deepseek.serve.embedding import Embeddings

PART_TOKENS = 128
"""That a decoder reads between two steps of those who wait for an answer."""


class EncoderEmbedder:
    """Embeds texts by an encoder. Is an `Embedder`.

    Args:
        engine: of the encoder; one of a single thread leaves the other cores to answers.
        name: as clients call it.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(self, engine: EncoderEngine, name: str) -> None:
        self.name, self._engine, self._tokenizer = name, engine, _needed(engine.tokenizer)
        self.dimensions = engine.config.hidden_size
        self.max_tokens = engine.config.max_embed_tokens or engine.config.max_positions
        self._thread = ThreadPoolExecutor(1, "embeddings")

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids of its tokenizer.

        Raises:
            ConfigError: an id that it does not have.
        """
        return _text_of(self._tokenizer, ids)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """Return a vector for each text; longer ones than `max_tokens` are cut."""
        return await asyncio.wrap_future(self._thread.submit(self._embed, list(texts)))

    def _embed(self, texts: list[str]) -> Embeddings:
        counts = [min(len(ids), self.max_tokens) for ids in self._tokenizer.encode_batch(texts)]
        return Embeddings(self._engine.embed(texts).tolist(), sum(counts))

    def close(self) -> None:
        """End the thread behind what is under way."""
        self._thread.shutdown()


class DecoderEmbedder:
    """Embeds texts by the last states of the decoder that answers. Is an `Embedder`.

    Args:
        engine: of the decoder.
        name: as clients call it.
        call: runs a function on the engine's thread between two steps, as `EngineLoop.call`.
        pooling: how the states of a text become one vector.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        call: Callable[[Callable[[], np.ndarray]], Future[np.ndarray]],
        *,
        pooling: Pooling = "mean",
    ) -> None:
        self.name, self._engine, self._tokenizer = name, engine, _needed(engine.tokenizer)
        self.dimensions = engine.config.hidden_size
        self.max_tokens = min(MOST_TOKENS, engine.config.max_positions)
        self._call = call
        self._pooling: Pooling = pooling
        self._pooler: Pooler | None = None  # its pages are taken when the first text comes
        self._turn = asyncio.Lock()

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids of its tokenizer.

        Raises:
            ConfigError: an id that it does not have.
        """
        return _text_of(self._tokenizer, ids)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """Return a vector for each text; longer ones than `max_tokens` are cut.

        Raises:
            ConfigError: a text has no tokens.
            CapacityError: there is no memory for the pages of one text.
            EngineError: the engine has ended.
        """
        vectors, num_tokens = [], 0
        for text in texts:
            async with self._turn:  # one text has the pages
                if self._pooler is None:
                    self._pooler = Pooler(self._engine, pooling=self._pooling)
                tokens = self._pooler.tokens_of(text)
                vectors.append(await self._vector(self._pooler, tokens))
            num_tokens += len(tokens)
        return Embeddings([vector.tolist() for vector in vectors], num_tokens)

    async def _vector(self, pooler: Pooler, tokens: list[int]) -> np.ndarray:
        found = []
        for start, stop in parts(len(tokens), PART_TOKENS):
            read = self._call(lambda start=start, stop=stop: pooler.read(tokens, start, stop))
            found.append(await asyncio.wrap_future(read))
        return pooler.joined(found)


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        step = "Use a model folder that has tokenizer.json"
        raise ConfigError(describe("model", "embeddings", "one with a tokenizer", None, step))
    return tokenizer


def _text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    if max(ids) >= tokenizer.vocab_size:
        must = f"ids below {tokenizer.vocab_size}"
        raise ConfigError(describe("input", "embeddings", must, max(ids)))
    return tokenizer.decode(ids)
