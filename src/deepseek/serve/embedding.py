"""Vectors of texts as the API asks for them: the seam to what computes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The vectors of some texts."""

    vectors: list[list[float]]
    """One a text, of length 1."""
    num_tokens: int
    """Read for them."""


class Embedder(Protocol):
    """Gives vectors of texts."""

    name: str
    """The model's, as clients call it."""
    dimensions: int
    max_tokens: int
    """Of a text; what is behind them is not read."""

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids of its tokenizer.

        Raises:
            ConfigError: an id that it does not have.
        """
        ...

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """Return a vector for each text."""
        ...
