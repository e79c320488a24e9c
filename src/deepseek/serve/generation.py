"""What a client asks of the engine and what comes back: the seam between the API and the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Literal, Protocol

from deepseek.data import Tokenizer
from deepseek.ops.sampling.config import Sampling
from deepseek.serve.core.errors import DeadlineError, EngineError, QueueFull
from deepseek.serve.core.request import FinishReason

__all__ = [
    "DeadlineError",
    "EngineError",
    "GenerationRequest",
    "Generator",
    "Grammar",
    "Output",
    "QueueFull",
    "TokenChoice",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """What an answer must look like."""

    kind: Literal["json_schema", "regex", "lark", "json_object"]
    text: str
    """The JSON schema as JSON, the regular expression or the grammar; empty for `json_object`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One answer that is wanted; everything in it has been checked."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict[int, float])
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    """Before so many tokens the answer does not end of itself."""
    logprobs: int | None = None
    """Most probable tokens shown beside each token of the answer; None where nobody looks."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    grammar: Grammar | None = None
    adapter: str | None = None
    """The name of a loaded adapter; the service puts its id in place of it, by which the engine and
    the cache know it."""
    tenant: str = ""
    priority: int = 0
    """The lower the sooner."""
    deadline_s: float | None = None
    """Seconds from now after which nobody wants the answer."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token as it was chosen."""

    token_id: int
    logprob: float | None = None
    """Under the model, before temperature and filters; None where it is not known, as for the
    first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens with their logprobs, best first, as many as were asked for."""
    entropy: float | None = None
    """Of the model's distribution that it comes from, in nats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What one step added to an answer. The texts of an answer's outputs join to its text."""

    text: str = ""
    """Whole characters that are certainly not part of a stop string."""
    tokens: tuple[TokenChoice, ...] = ()
    finish_reason: FinishReason | None = None
    """Set on the last output."""
    stopped_by: str | int | None = None
    """The stop string or token id that ended it; None where the model's own end token did."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that did not have to be computed."""
    prompt_logprobs: tuple[TokenChoice, ...] | None = None
    """With the first output, where they were asked for."""


class Generator(Protocol):
    """An engine as the API sees it. Its methods are called from one event loop."""

    tokenizer: Tokenizer
    context: int
    """Most tokens of a prompt and its answer together."""
    vocab_size: int

    def generate(self, request: GenerationRequest) -> AsyncIterator[Output]:
        """Yield the outputs of an answer as they come. Closing the iterator cancels it.

        Raises:
            QueueFull: before the first output.
            DeadlineError: before the first output or between two.
            EngineError: at any time.
        """
        ...

    def is_ready(self) -> bool:
        """Return whether it takes requests."""
        ...

    def retry_after_s(self) -> float:
        """Return a guess of the seconds until a request that comes now would be begun."""
        ...
