"""Runs the scheduler's steps on a packed engine: one call of the flat step for all requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.generate.adapters import NO_ADAPTER, EngineAdapter
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE
from deepseek.ops.cpu import kernels
from deepseek.serve.core.request import PageCopy, Work
from deepseek.serve.executor import Matcher, Result
from deepseek.serve.generation import GenerationRequest, TokenChoice
from deepseek.serve.runtime.sampler import Sampler, describe_choice
from deepseek.serve.stepping import StepEngine

_LEAST_COPIED = 8
"""Tokens in common that a page is copied for; fewer are computed as soon."""


@dataclasses.dataclass
class _Open:
    """A request that is under way."""

    generation: GenerationRequest
    sampler: Sampler
    adapter: EngineAdapter | None
    """Held until the request is closed, so that it may be dropped meanwhile."""
    prompt: list[TokenChoice] = dataclasses.field(default_factory=list)
    """The tokens of the prompt behind the first, as far as they have been read."""

    is_prompt_given: bool = False

    @property
    def reads_prompt(self) -> bool:
        """Whether logprobs of the prompt are wanted and not all there."""
        num_wanted = len(self.generation.prompt) - 1
        return self.generation.prompt_logprobs is not None and len(self.prompt) < num_wanted


class EngineExecutor:
    """Executes work on an engine; all its pages are made at once.

    Args:
        engine: whose step runs.
        num_pages: pages of 64 tokens.

    Raises:
        CapacityError: there is not enough memory for the pages.
    """

    page_size = PAGE_SIZE
    max_step_tokens = MAX_STEP_TOKENS

    def __init__(self, engine: StepEngine, num_pages: int) -> None:
        self._engine, self.num_pages = engine, num_pages
        self.context = engine.config.max_positions
        self._pages = engine.new_pages(num_pages)
        self.least_copied = _LEAST_COPIED if engine.can_copy_pages else None
        self._open: dict[str, _Open] = {}
        tokenizer = engine.tokenizer
        self._end_token_ids = () if tokenizer is None else tokenizer.eos_token_ids

    def open(
        self, request_id: str, generation: GenerationRequest, matcher: Matcher | None = None
    ) -> None:
        """Make ready for a request.

        Raises:
            ConfigError: its adapter is not loaded, or was dropped since it was resolved.
        """
        adapter = self._adapter(generation.adapter)
        ends = {*self._end_token_ids, *generation.stop_token_ids}
        vocab_size, isa = self._engine.config.vocab_size, self._engine.instruction_set
        sampler = Sampler(generation, vocab_size, ends, matcher, instruction_set=isa)
        self._open[request_id] = _Open(generation, sampler, adapter)

    def _adapter(self, name: str | None) -> EngineAdapter | None:
        if name is None:
            return None
        adapter = self._engine.adapters.get(name)
        if adapter is None:
            step = "It may have been dropped: ask for the list of models"
            raise ConfigError(describe("adapter", "the request", "one that is loaded", name, step))
        return adapter

    def close(self, request_id: str) -> None:
        """Forget a request; its pages are the scheduler's."""
        self._open.pop(request_id, None)

    def execute(self, work: Sequence[Work], copies: Sequence[PageCopy] = ()) -> list[Result]:
        """Copy pages, one after another, then append the tokens of a step and choose the next
        ones."""
        for target, source in copies:
            self._pages.copy(target, source)
        plan = [self._selected(item) for item in work]
        tokens = [token for item in work for token in item.tokens]
        places = [np.arange(item.start, item.start + len(item.tokens)) for item in work]
        counts = [len(item.tokens) for item in work]
        rows = np.repeat(np.arange(len(work)), counts)
        starts = np.cumsum([0, *counts[:-1]])
        selected = np.concatenate([start + own for start, own in zip(starts, plan, strict=True)])
        table = _page_table(work)
        positions = np.concatenate(places)
        adapters = self._adapters(work, counts)
        logits = self._engine.step(self._pages, tokens, positions, rows, table, selected, adapters)
        isa = self._engine.instruction_set
        largest = kernels().largest(isa, logits) if len(logits) else []
        certainty = kernels().certainty(isa, logits) if len(logits) else []
        results, first = [], 0
        for item, own in zip(work, plan, strict=True):
            part = slice(first, first + len(own))
            results.append(self._result(item, logits[part], largest[part], certainty[part]))
            first = part.stop
        return results

    def _adapters(self, work: Sequence[Work], counts: Sequence[int]) -> np.ndarray | None:
        """Return the number of each token's adapter, None where none has one."""
        held = [self._open[item.request.id].adapter for item in work]
        if not any(held):
            return None
        numbers = [NO_ADAPTER if each is None else each.number for each in held]
        return np.repeat(numbers, counts)

    def _selected(self, item: Work) -> np.ndarray:
        """Return the places in the work's tokens whose logits are wanted."""
        count = len(item.tokens)
        if self._open[item.request.id].reads_prompt:
            return np.arange(count)
        return np.arange(count - item.num_drafts - 1 if item.is_choosing else count, count)

    def _result(
        self,
        item: Work,
        logits: np.ndarray,
        largest: Sequence[int],
        certainty: Sequence[tuple[float, float]],
    ) -> Result:
        request = self._open[item.request.id]
        if request.reads_prompt:
            _read_prompt(request, item, logits, certainty)
        if not item.is_choosing:  # the prompt may be read already where one token of it is left
            return Result(())
        prompt = () if request.is_prompt_given else tuple(request.prompt)
        request.is_prompt_given = True
        chosen: list[TokenChoice] = []
        drafts = (*item.tokens[len(item.tokens) - item.num_drafts :], None)
        first = len(logits) - item.num_drafts - 1
        for place, draft in enumerate(drafts, first):
            try:
                choice = request.sampler.choose(logits[place], largest[place], certainty[place])
            except CapacityError as error:
                return Result(tuple(chosen), prompt, error=str(error))
            if choice is None:
                return Result(tuple(chosen), prompt, is_finite=False)
            chosen.append(choice)
            if choice.token_id != draft:
                break
        return Result(tuple(chosen), prompt)


def _read_prompt(
    request: _Open, item: Work, logits: np.ndarray, certainty: Sequence[tuple[float, float]]
) -> None:
    """Add the tokens of the prompt that stand behind those whose logits are here; a request that
    was turned back reads some again."""
    prompt, num_top = request.generation.prompt, request.generation.prompt_logprobs or 0
    for place, (row, sure) in enumerate(zip(logits, certainty, strict=True), item.start + 1):
        if len(request.prompt) + 1 <= place < len(prompt):
            request.prompt.append(describe_choice(row, prompt[place], num_top, sure))


def _page_table(work: Sequence[Work]) -> np.ndarray:
    width = max(len(item.pages) for item in work)
    table = np.zeros((len(work), width), np.int32)
    for row, item in enumerate(work):
        table[row, : len(item.pages)] = item.pages
    return table
