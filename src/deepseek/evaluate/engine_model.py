"""An engine as a model that can be measured: what users run, with all that it rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import CapacityError, describe

if TYPE_CHECKING:
    from deepseek.data import Tokenizer
    from deepseek.generate import Engine


class EngineModel:
    """A `CausalModel` whose logits an engine computes, a row after another, from nothing cached."""

    def __init__(self, engine: Engine) -> None:
        """Take an engine; its pages are made as they are needed and kept."""
        self.engine = engine
        self.config = engine.config
        self.bundle = engine.bundle
        self._pages: object | None = None
        self._num_pages = 0

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's."""
        return self.engine.tokenizer

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits float32 [B, T, V]; those of padding are 0.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 = padding on the right; None when no row is padded.
        """
        rows, length = input_ids.shape
        logits = torch.zeros(rows, length, self.config.vocab_size)
        for row in range(rows):
            count = length if attention_mask is None else int(attention_mask[row].sum())
            logits[row, :count] = self._row(input_ids[row, :count])
        return logits

    def _row(self, tokens: Tensor) -> Tensor:
        from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE

        count = len(tokens)
        if count > self.config.max_positions:
            must = f"at most {self.config.max_positions} tokens"
            raise CapacityError(describe("input_ids", "the engine", must, count))
        num_pages = -(-count // PAGE_SIZE)
        if num_pages > self._num_pages:
            self._pages, self._num_pages = self.engine.new_pages(num_pages), num_pages
        table = np.arange(num_pages, dtype=np.int32)[None]
        found = []
        for first in range(0, count, MAX_STEP_TOKENS):
            places = np.arange(first, min(first + MAX_STEP_TOKENS, count))
            picked = places - first
            part = tokens[places].numpy()
            found.append(
                self.engine.step(self._pages, part, places, np.zeros_like(places), table, picked)
            )
        return torch.from_numpy(np.concatenate(found))
