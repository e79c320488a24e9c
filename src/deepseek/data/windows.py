"""Windows of several corpora in one order: what a training step reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepseek.data.corpus import TokenCorpus
from deepseek.data.order import Places, SampleOrder
from deepseek.errors import ConfigError, describe


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some samples that follow one another in an order."""

    first: int
    """Number of the first."""
    tokens: NDArray[np.int64]
    """[samples, length]."""
    targets: NDArray[np.bool_]
    """[samples, length], where a token is to be predicted; never the first of a window."""
    places: Places


class Windows:
    """Corpora cut into windows of one length, in an order that knows no workers.

    Windows of a corpus share their border: the last token of one is the context that the next
    begins with. So every token but the corpus' first is predicted once, and what does not fill the
    last window is left out.
    """

    def __init__(
        self,
        corpora: Sequence[TokenCorpus],
        *,
        length: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        """Cut the corpora.

        Args:
            corpora: at least one.
            length: tokens of a window, at least 2.
            weights, seed: as in `SampleOrder`.

        Raises:
            ConfigError: a corpus is shorter than a window, or the weights do not fit.
        """
        if length < 2:
            raise ConfigError(describe("length", "Windows", "at least 2", length))
        for corpus in corpora:
            if corpus.num_tokens < length:
                must, step = f"at least {length} tokens long", "Take a shorter length or more text"
                got = f"{corpus.num_tokens} tokens"
                raise ConfigError(describe(corpus.card.name, "the data", must, got, step))
        self.corpora, self.length = tuple(corpora), length
        self._sizes = [(corpus.num_tokens - 1) // (length - 1) for corpus in corpora]
        self.order = SampleOrder(self._sizes, weights=weights, seed=seed)
        self.has_targets = any(corpus.has_targets for corpus in corpora)

    @property
    def num_windows(self) -> int:
        """Windows of all corpora."""
        return sum(self._sizes)

    def read(self, first: int, count: int) -> Samples:
        """Return `count` samples from the `first` on.

        Raises:
            FormatError: a shard is not what was written.
        """
        places = self.order.places(first, count)
        tokens = np.empty((count, self.length), np.int64)
        targets = np.zeros((count, self.length), np.bool_)
        pairs = zip(places.source.tolist(), places.window.tolist(), strict=True)
        for row, (source, window) in enumerate(pairs):
            start = window * (self.length - 1)
            corpus = self.corpora[source]
            tokens[row] = corpus.read(start, self.length)
            targets[row, 1:] = corpus.read(start + 1, self.length - 1, "targets") != 0
        return Samples(first, tokens, targets, places)

    def num_targets(self, first: int, count: int) -> int:
        """Return the tokens to predict of `count` samples; they are read only where some tokens are
        context."""
        if not self.has_targets:
            return count * (self.length - 1)
        return int(self.read(first, count).targets.sum())
