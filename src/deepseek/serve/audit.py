"""Is what is served what the model says? Some answers are read again, with everything off that
makes serving fast: cache, guesses, batches and, where there is a reference engine, quantization.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from deepseek.generate.adapters import EngineAdapter
from deepseek.generate.engine import PAGE_SIZE
from deepseek.serve.generation import TokenChoice
from deepseek.serve.stepping import StepEngine

NUM_TOP = 20
"""Most probable tokens that are compared one by one; all others count as one."""
PART_TOKENS = 64
"""Read between two looks at whether somebody waits."""
MOST_WAITING = 16


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """What reading an answer again gave."""

    kl: float
    """Mean over its tokens of the divergence of what was served from the reference, in nats: at
    least this, as all tokens that are not among the most probable count as one."""
    worst_kl: float
    """The largest of one token."""
    agreement: float
    """Share of its tokens where both have the same most probable one."""
    num_tokens: int


@dataclasses.dataclass
class _Answer:
    tokens: list[int]
    num_prompt: int
    choices: Sequence[TokenChoice]
    adapter: EngineAdapter | None
    """Held until it has been read, so that it may be dropped meanwhile."""
    num_read: int = 0
    kls: list[float] = dataclasses.field(default_factory=list)
    num_agreeing: int = 0


class Auditor:
    """Reads one answer in `every` again, a part at a time, when the engine has nothing else to do.

    All methods are called on the engine's thread.

    Args:
        engine: computes the reference: the one that serves, or one of the same model that is less
            quantized; it has the adapters that answers are made with.
        every: answers of which one is audited.
        on_result: gets what came out.
    """

    def __init__(
        self, engine: StepEngine, every: int, on_result: Callable[[AuditResult], None]
    ) -> None:
        self._engine, self._every, self._on_result = engine, every, on_result
        num_pages = -(-engine.config.max_positions // PAGE_SIZE)
        self._pages = engine.new_pages(num_pages)
        self._table = np.arange(num_pages, dtype=np.int32)[None]
        self._waiting: deque[_Answer] = deque()
        self._num_asked = 0
        self.num_dropped = 0
        """Answers that were chosen and never read again: others came meanwhile, or their adapter
        was gone."""

    def wants_next(self) -> bool:
        """Return whether the answer that begins now is one to audit; its tokens then need `NUM_TOP`
        logprobs."""
        self._num_asked += 1
        return self._num_asked % self._every == 0

    def take(
        self, prompt: Sequence[int], choices: Sequence[TokenChoice], adapter: str | None = None
    ) -> None:
        """Keep an answer to read it again; of too many the oldest is dropped.

        Args:
            prompt: its ids.
            choices: its tokens, with `NUM_TOP` logprobs.
            adapter: the id of the adapter that it was made with.
        """
        if not choices:
            return
        held = None if adapter is None else self._engine.adapters.get(adapter)
        if adapter is not None and held is None:
            self.num_dropped += 1
            return
        tokens = [*prompt, *(choice.token_id for choice in choices[:-1])]
        self._waiting.append(_Answer(tokens, len(prompt), choices, held))
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.num_dropped += 1

    def advance(self) -> bool:
        """Read one part; return whether there is more to do."""
        if not self._waiting:
            return False
        answer = self._waiting[0]
        self._read(answer)
        if answer.num_read == len(answer.tokens):
            self._waiting.remove(answer)
            count = len(answer.kls)
            worst = max(answer.kls)
            self._on_result(
                AuditResult(sum(answer.kls) / count, worst, answer.num_agreeing / count, count)
            )
        return bool(self._waiting)

    def _read(self, answer: _Answer) -> None:
        start = answer.num_read
        stop = min(start + PART_TOKENS, len(answer.tokens))
        first = max(answer.num_prompt - 1, start)
        positions, rows = np.arange(start, stop), np.zeros(stop - start)
        selected = np.arange(first, stop) - start
        part = answer.tokens[start:stop]
        held = answer.adapter
        numbers = None if held is None else np.full(stop - start, held.number)
        logits = self._engine.step(
            self._pages, part, positions, rows, self._table, selected, numbers
        )
        for place, row in enumerate(logits, first - answer.num_prompt + 1):
            choice = answer.choices[place]
            answer.kls.append(divergence(choice, row))
            answer.num_agreeing += bool(choice.top[0][0] == int(row.argmax()))
        answer.num_read = stop


def divergence(served: TokenChoice, reference: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence of a served distribution from a reference, in nats,
    over the served one's most probable tokens and all others as one.

    Joining tokens can only make it smaller, so it is a lower bound.

    Args:
        served: with `top`.
        reference: logits [V].
    """
    exact = reference.astype(np.float64)
    exact -= exact.max()
    log_sum = math.log(float(np.exp(exact).sum()))
    places = [token for token, _ in served.top]
    ours = np.array([value for _, value in served.top], np.float64)
    theirs = exact[places] - log_sum
    found = float((np.exp(ours) * (ours - theirs)).sum())
    rest, their_rest = (max(1.0 - float(np.exp(each).sum()), 1e-12) for each in (ours, theirs))
    return max(0.0, found + rest * math.log(rest / their_rest))
