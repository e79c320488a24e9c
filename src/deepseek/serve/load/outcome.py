"""What became of a request, as its user saw it."""

from __future__ import annotations

import dataclasses
from itertools import pairwise


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """One request and its answer. Times are of one clock, in seconds."""

    dialogue: int
    turn: int = 0
    planned_s: float
    """When it was to be sent."""
    sent_s: float
    """When it was sent; at its last try, if it was sent again after a refusal, it is still the
    first."""
    ended_s: float = 0.0
    """When the last byte of the answer came, or the error."""
    piece_times_s: list[float] = dataclasses.field(default_factory=list[float])
    """When each piece of text came. Pieces that came in one packet have one time."""
    text: str = ""
    prompt_tokens: int | None = None
    """As the server counts; None where it does not say."""
    answer_tokens: int | None = None
    cached_tokens: int | None = None
    """Tokens of the prompt that the server says it had not to compute."""
    finish_reason: str | None = None
    error: str | None = None
    """What kind of failure: `refused` (no connection), `dropped` (connection lost), `timeout`,
    `http_429` and the like, `not_a_stream`, `bad_event`, `error_event` (the server says so in the
    stream), `cut_short` (ended without an end), `empty` (no text); None for an answer."""
    detail: str = ""
    """What was said with the error."""
    hung_up: bool = False
    """The user was gone before the end, as planned."""
    retries: int = 0
    """Times it was sent again because the server said when to."""

    @property
    def is_answered(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None and not self.hung_up

    @property
    def queue_s(self) -> float:
        """Seconds it waited here before it was sent."""
        return self.sent_s - self.planned_s

    @property
    def first_token_s(self) -> float:
        """Seconds from sending to the first piece of text."""
        return self.piece_times_s[0] - self.sent_s

    @property
    def end_to_end_s(self) -> float:
        """Seconds from sending to the end."""
        return self.ended_s - self.sent_s

    @property
    def tokens(self) -> int:
        """Tokens of the answer; pieces where the server does not count."""
        pieces = len(self.piece_times_s)
        return pieces if self.answer_tokens is None else self.answer_tokens

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean seconds from one token to the next; None for a single token."""
        if self.tokens < 2:
            return None
        return (self.piece_times_s[-1] - self.piece_times_s[0]) / (self.tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds from each piece of text to the next."""
        return [after - before for before, after in pairwise(self.piece_times_s)]

    @property
    def token_gaps_s(self) -> list[float]:
        """Seconds from each token to the next, with the time of a piece spread over its tokens.

        How many tokens a piece has is not said, so each has the mean of its answer.
        """
        if self.tokens < 2:
            return []
        share = (len(self.piece_times_s) - 1) / (self.tokens - 1)
        return [gap * min(1.0, share) for gap in self.gaps_s]
