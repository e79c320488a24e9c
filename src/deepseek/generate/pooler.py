"""Vectors of texts from a decoder's last states. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from deepseek.errors import ConfigError, describe
from deepseek.generate.encoder_engine import normalized
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE, Engine

Pooling = Literal["mean", "last"]

MOST_TOKENS = 2048
"""Of a text, unless more is asked for: bounds the memory of keys and values."""


class Pooler:
    """Reads one text at a time and makes one vector of its tokens' last states.

    The states are those behind the decoder's last norm, which its head reads. A decoder that was
    not trained for it gives vectors of modest use: "mean" is the better choice for such a one,
    "last" that of decoders that were trained to embed.

    Args:
        engine: of the decoder.
        pooling: the mean over all tokens, or the state of the last one.
        max_tokens: of a text; what is behind them is not read.

    Raises:
        ConfigError: an unknown pooling.
    """

    def __init__(
        self, engine: Engine, *, pooling: Pooling = "mean", max_tokens: int = MOST_TOKENS
    ) -> None:
        if pooling not in ("mean", "last"):
            raise ConfigError(describe("pooling", "Pooler", "'mean' or 'last'", pooling))
        self.engine, self.pooling = engine, pooling
        self.max_tokens = min(max_tokens, engine.config.max_positions)
        num_pages = -(-self.max_tokens // PAGE_SIZE)
        self._pages = engine.new_pages(num_pages)
        self._table = np.arange(num_pages, dtype=np.int32)[None]

    def read(self, tokens: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Return what the tokens `start` to `stop` - 1 give, float32 [hidden]: the sum of their
        states, or the last one. Those before them have been read.

        Args:
            tokens: of the text.
            start: where to begin.
            stop: at most `MAX_STEP_TOKENS` behind it.
        """
        count = stop - start
        selected = range(count) if self.pooling == "mean" else [count - 1]
        places, rows = np.arange(start, stop), np.zeros(count)
        states = self.engine.states(
            self._pages, tokens[start:stop], places, rows, self._table, selected
        )
        return states.sum(0)

    def vector(self, tokens: Sequence[int], part: int = MAX_STEP_TOKENS) -> np.ndarray:
        """Return the vector of a text, float32 [hidden], of length 1.

        Args:
            tokens: at least 1; those behind `max_tokens` are not read.
            part: tokens of a step.
        """
        tokens = tokens[: self.max_tokens]
        found = [self.read(tokens, *ends) for ends in parts(len(tokens), part)]
        return self.joined(found)

    def joined(self, found: Sequence[np.ndarray]) -> np.ndarray:
        """Return the vector of a text of what its parts gave, in order."""
        return normalized(np.sum(found, 0) if self.pooling == "mean" else found[-1])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts, float32 [n, hidden], of length 1.

        Raises:
            ConfigError: the engine has no tokenizer, or a text has no tokens.
        """
        if self.engine.tokenizer is None:
            step = "Load a bundle with a tokenizer, or call vector with token ids"
            raise ConfigError(describe("tokenizer", "Pooler.embed", "loaded", None, step))
        return np.array([self.vector(self.tokens_of(text)) for text in texts])

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a text, as many as are read.

        Raises:
            ConfigError: it has none.
        """
        assert self.engine.tokenizer is not None
        tokens = self.engine.tokenizer.encode(text)[: self.max_tokens]
        if not tokens:
            raise ConfigError(describe("text", "Pooler", "at least one token long", text))
        return tokens


def parts(count: int, size: int) -> list[tuple[int, int]]:
    """Return the ends of the parts that `count` tokens are read in, `size` tokens each at most."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]
