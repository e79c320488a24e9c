"""Vectors of texts by an encoder, one batch at a time on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepseek import hub
from deepseek.errors import ConfigError, describe
from deepseek.serve.embedding import Embeddings

BATCH_SIZE = 16


class EncoderEmbedder:
    """Embeds texts by an encoder of a bundle. Is an `Embedder`.

    PyTorch computes on one thread, so that answers beside it keep the other cores.

    Args:
        source: a name, a folder.
        name: as clients call it.

    Raises:
        ConfigError: the model is no encoder, or has no tokenizer.
    """

    def __init__(self, source: str | Path, name: str) -> None:
        import torch

        from deepseek.models import Encoder

        torch.set_num_threads(1)
        model = hub.load(source)
        if not isinstance(model, Encoder) or model.tokenizer is None:
            must = "an encoder with a tokenizer"
            step = "Use all-minilm-l6-v2"
            raise ConfigError(describe("--embeddings", "deepseek serve", must, str(source), step))
        self.name, self._model, self._tokenizer = name, model, model.tokenizer
        self.dimensions = model.config.hidden_size
        self.max_tokens = model.config.max_embed_tokens or model.config.max_positions
        self._thread = ThreadPoolExecutor(1, "embeddings")

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids of its tokenizer.

        Raises:
            ConfigError: an id that it does not have.
        """
        vocab_size = self._tokenizer.vocab_size
        if max(ids) >= vocab_size:
            raise ConfigError(describe("input", "embeddings", f"ids below {vocab_size}", max(ids)))
        return self._tokenizer.decode(ids)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """Return a vector for each text; longer ones than `max_tokens` are cut."""
        return await asyncio.wrap_future(self._thread.submit(self._embed, list(texts)))

    def _embed(self, texts: list[str]) -> Embeddings:
        counts = [min(len(ids), self.max_tokens) for ids in self._tokenizer.encode_batch(texts)]
        vectors = self._model.embed(texts, batch_size=BATCH_SIZE)
        return Embeddings(vectors.float().tolist(), sum(counts))

    def close(self) -> None:
        """End the thread behind what is under way."""
        self._thread.shutdown()
