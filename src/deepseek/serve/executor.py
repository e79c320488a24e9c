"""What computes a step: the seam between the engine and a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deepseek.serve.core.request import Work
from deepseek.serve.generation import GenerationRequest, TokenChoice


class Executor(Protocol):
    """Appends tokens to pages and chooses the next ones. Called from one thread."""

    page_size: int
    num_pages: int
    max_step_tokens: int
    context: int
    """Most tokens of a prompt and its answer together."""

    def open(self, request_id: str, generation: GenerationRequest) -> None:
        """Take note of how tokens are to be chosen for a request, before its first work."""
        ...

    def execute(self, work: Sequence[Work]) -> list[list[TokenChoice]]:
        """Compute a step and return what was chosen for each work.

        Nothing where the work is not `is_choosing`. With guesses: the tokens chosen up to and
        including the first that differs from its guess, so at least one and at most one more than
        there were guesses.
        """
        ...

    def close(self, request_id: str) -> None:
        """Forget a request; one that is unknown is no error."""
        ...
