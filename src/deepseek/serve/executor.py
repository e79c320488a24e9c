"""What a step runs on: the seam between the scheduler's decisions and what computes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from deepseek.serve.core.request import PageCopy, Work
from deepseek.serve.generation import GenerationRequest, TokenChoice


class Matcher(Protocol):
    """Where an answer stands in its grammar."""

    @property
    def is_complete(self) -> bool:
        """True where nothing but the end may come."""
        ...

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits [V] of tokens that may not come next to minus infinity.

        Raises:
            CapacityError: the grammar became too costly on the way.
        """
        ...

    def take(self, token: int) -> None:
        """Go on behind a token that was allowed."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What one work gave."""

    tokens: tuple[TokenChoice, ...]
    """Chosen tokens, up to and including the first that differs from its guess; empty where the
    work does not choose."""
    prompt: tuple[TokenChoice, ...] = ()
    """Logprobs of the prompt's tokens behind the first, with the first token that is chosen."""
    is_finite: bool = True
    """False where the model's numbers are not: what the request's pages hold is bad."""
    error: str | None = None
    """Why the request cannot go on."""


class Executor(Protocol):
    """Computes steps, and owns the memory of the pages."""

    page_size: int
    num_pages: int
    max_step_tokens: int
    context: int
    """Most tokens of a prompt and its answer together."""
    least_copied: int | None
    """Tokens that a page is copied for; None where pages cannot be copied."""

    def open(
        self, request_id: str, generation: GenerationRequest, matcher: Matcher | None = None
    ) -> None:
        """Make ready for a request.

        Raises:
            ConfigError: its adapter is not loaded.
        """
        ...

    def execute(self, work: Sequence[Work], copies: Sequence[PageCopy] = ()) -> list[Result]:
        """Copy pages, one after another, then append the tokens of a step and choose the next
        ones."""
        ...

    def close(self, request_id: str) -> None:
        """Forget a request; unknown ones are no error."""
        ...
