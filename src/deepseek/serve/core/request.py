"""A request while the scheduler has it, and the work of one step."""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "repetition", "cancelled", "deadline", "error"]
"""`stop`: a token or string that ends the text, or a grammar that is complete; `length`: as many
tokens as were asked for, or the context is full; `repetition`: the text went round in circles;
`cancelled`: nobody waits for it any more; `deadline`: its time has passed; `error`: the model's
numbers were not finite, or the engine died."""


class Phase(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    """Holds no pages: new, or turned back because pages were short."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """What the scheduler knows of a request. Only the scheduler writes to its lower half."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    tenant: str = ""
    """Who pays for it. Pages are shared within a tenant only."""
    adapter: str | None = None
    """Changes what pages hold, so they are shared among requests of one adapter only."""
    priority: int = 0
    """The lower the sooner."""
    arrival_s: float = 0.0
    deadline_s: float | None = None
    """Time on the scheduler's clock at which nobody wants the answer any more."""
    reads_cache: bool = True
    """False where the logits of the whole prompt are wanted, or for an audit."""
    writes_cache: bool = True
    """Whether its full pages may be found by others; turned off when its numbers are bad."""

    tokens: list[int] = dataclasses.field(init=False)
    """The prompt, and behind it what was chosen."""
    drafts: list[int] = dataclasses.field(default_factory=list, init=False)
    """Guesses of the tokens behind `tokens`, to be checked by the next step."""
    pages: list[int] = dataclasses.field(default_factory=list, init=False)
    num_computed: int = dataclasses.field(default=0, init=False)
    """Of `tokens`: how many its pages hold."""
    num_cached: int = dataclasses.field(default=0, init=False)
    """Tokens of the prompt that were found in pages of earlier requests, when it first ran."""
    num_preempted: int = dataclasses.field(default=0, init=False)
    first_run_s: float | None = dataclasses.field(default=None, init=False)
    phase: Phase = dataclasses.field(default=Phase.WAITING, init=False)
    finish_reason: FinishReason | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.tokens = list(self.prompt)

    @property
    def num_chosen(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.prompt)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does for one request: append tokens, and choose behind the last ones."""

    request: Request
    start: int
    """Position of the first token."""
    tokens: tuple[int, ...]
    """What is appended: tokens, and behind them `num_drafts` guesses."""
    num_drafts: int
    pages: tuple[int, ...]
    """Hold the positions from 0 to `start + len(tokens) - 1`."""

    @property
    def is_choosing(self) -> bool:
        """Whether the request's newest token is in it, so that a next one can be chosen."""
        return self.start + len(self.tokens) - self.num_drafts == len(self.request.tokens)


class PageCopy(NamedTuple):
    """A page that begins as another does."""

    target: int
    source: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One decision of the scheduler: which requests advance, by how many tokens each."""

    work: tuple[Work, ...]
    dropped: tuple[Request, ...] = ()
    """Finished without another token: cancelled, or their deadline has passed."""
    copies: tuple[PageCopy, ...] = ()
    """To be done in this order before anything is computed."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step appends, guesses included."""
        return sum(len(item.tokens) for item in self.work)
