"""How many tokens an answer has taken, as the client reads it."""

from __future__ import annotations

from deepseek.serve.api.jobs import Job
from deepseek.serve.api.schema.answers import PromptTokensDetails, Usage
from deepseek.serve.generation import Output


class UsageCount:
    """Counts the tokens of a job's answers."""

    def __init__(self, job: Job, *, counts_answers: bool = True) -> None:
        """Begin with the prompts, each counted once however many answers it has.

        Args:
            job: what was asked.
            counts_answers: False where only prompts are wanted, and the token that the engine makes
                behind each is nobody's.
        """
        self._counts_answers = counts_answers
        self._num_choices = job.num_choices
        self._num_prompt_tokens = sum(len(prompt) for prompt in job.prompts)
        self._cached = [0] * len(job.prompts)
        self._num_tokens = 0

    def take(self, number: int, output: Output) -> None:
        """Count an output of answer `number`; of a prompt's answers the first tells what was
        cached."""
        if self._counts_answers:
            self._num_tokens += len(output.tokens)
        prompt, choice = divmod(number, self._num_choices)
        if choice == 0:
            self._cached[prompt] = max(self._cached[prompt], output.num_cached_tokens)

    def usage(self) -> Usage:
        """Return the numbers so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            total_tokens=self._num_prompt_tokens + self._num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached)),
        )
