"""Guesses by a smaller model of the same tokenizer, greedily."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from deepseek.errors import ConfigError, describe
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE
from deepseek.ops.cpu import kernels
from deepseek.serve.core.cost import Average
from deepseek.serve.core.request import Request
from deepseek.serve.stepping import StepEngine

MOST_TEXTS = 4
"""Requests that it follows at once; guesses pay with few."""


class ModelDrafter:
    """Guesses by a small model. Is a `Drafter`.

    Each text has pages of its own in the small model; what was guessed wrong is computed again.
    Choosing greedily keeps the answer's distribution, since the large model draws each token itself
    and goes on only where it drew what was guessed.

    Source: speculative decoding (Leviathan et al. 2023, 2211.17192); there the draft draws, and is
    accepted by the quotient of both probabilities.

    Args:
        engine: of the small model.
        context: most tokens of a text.
        vocab_size: of the large model.

    Raises:
        ConfigError: the small model's context is shorter, or it has other token ids.
    """

    def __init__(self, engine: StepEngine, context: int, vocab_size: int) -> None:
        if engine.config.vocab_size != vocab_size:
            must = f"one of the same {vocab_size} token ids"
            raise ConfigError(describe("--draft", "deepseek serve", must, engine.config.vocab_size))
        if engine.config.max_positions < context:
            must = f"one of at least {context} tokens of context"
            got = f"{engine.config.max_positions} tokens"
            raise ConfigError(describe("--draft", "deepseek serve", must, got))
        self._engine = engine
        per_text = -(-context // PAGE_SIZE)
        self._pages = engine.new_pages(MOST_TEXTS * per_text)
        self._tables = np.arange(MOST_TEXTS * per_text, dtype=np.int32).reshape(MOST_TEXTS, 1, -1)
        self._context = context
        self._free = list(range(MOST_TEXTS))
        self._texts: OrderedDict[str, _Text] = OrderedDict()
        self._guess_s = Average(0.2)

    @property
    def guess_s(self) -> float:
        """Seconds of one guess; 0 before the first one."""
        return self._guess_s.value or 0.0

    def draft(self, request: Request, most: int) -> Sequence[int]:
        """Return at most `most` guesses of the tokens behind `request.tokens`; none where it
        follows as many texts as it can."""
        text = self._text_of(request)
        most = min(most, self._context - len(request.tokens))
        if text is None or most < 1:
            return []
        logits = self._catch_up(text, request.tokens)
        guesses: list[int] = []
        start_s = time.perf_counter()
        while True:
            guesses += kernels().largest(self._engine.instruction_set, logits)
            if len(guesses) == most:
                break
            logits = self._append(text, guesses[-1:])
        if most > 1:
            self._guess_s.observe((time.perf_counter() - start_s) / (most - 1))
        return guesses

    def close(self, request: Request) -> None:
        """Forget a request that is finished."""
        text = self._texts.pop(request.id, None)
        if text is not None:
            self._free.append(text.place)

    def _text_of(self, request: Request) -> _Text | None:
        found = self._texts.get(request.id)
        if found is None and self._free:
            found = self._texts[request.id] = _Text(self._free.pop())
        return found

    def _catch_up(self, text: _Text, tokens: Sequence[int]) -> np.ndarray:
        """Compute what the pages of a text do not hold; return the logits behind its end."""
        same = 0
        for ours, theirs in zip(text.tokens, tokens[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        del text.tokens[same:]
        logits = np.empty((0, 0), np.float32)
        for start in range(same, len(tokens), MAX_STEP_TOKENS):
            logits = self._append(text, tokens[start : start + MAX_STEP_TOKENS])
        return logits

    def _append(self, text: _Text, tokens: Sequence[int]) -> np.ndarray:
        count, start = len(tokens), len(text.tokens)
        positions, rows = np.arange(start, start + count), np.zeros(count)
        table = self._tables[text.place]
        logits = self._engine.step(self._pages, tokens, positions, rows, table, [count - 1])
        text.tokens += tokens
        return logits


class _Text:
    """A text in the pages of the small model."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.tokens: list[int] = []
