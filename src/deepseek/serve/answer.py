"""One answer while it grows: its text, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek.data import Tokenizer
from deepseek.generate.stop import TextStream
from deepseek.serve.circles import CircleDetector
from deepseek.serve.core.request import FinishReason
from deepseek.serve.executor import Matcher
from deepseek.serve.generation import GenerationRequest, Output, TokenChoice


class Answer:
    """Takes the tokens of one request and says what a client gets of them.

    Args:
        request: what is asked for.
        tokenizer: of the model; None for ids alone.
        context: most tokens of prompt and answer together.
        matcher: of the request's grammar.
        longest_circle: tokens of a text that repeats itself exactly before it is ended.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer | None,
        context: int,
        matcher: Matcher | None = None,
        longest_circle: int = 512,
    ) -> None:
        self._request, self._matcher = request, matcher
        self._tokens_left = min(request.max_tokens, context - len(request.prompt))
        own = () if tokenizer is None or request.ignore_eos else tokenizer.eos_token_ids
        self._own_ends, self._asked_ends = frozenset(own), frozenset(request.stop_token_ids)
        self._text = None if tokenizer is None else TextStream(tokenizer, request.stop)
        self._circles = CircleDetector(longest_circle)

    def take(self, tokens: Sequence[TokenChoice]) -> Output:
        """Return what these tokens add; those behind the end are not in it."""
        text, taken = "", 0
        reason: FinishReason | None = None
        stopped_by: str | int | None = None
        for choice in tokens:
            taken += 1
            self._tokens_left -= 1
            piece, reason, stopped_by = self._one(choice.token_id)
            text += piece
            if reason is not None:
                break
        return Output(
            text=text, tokens=tuple(tokens[:taken]), finish_reason=reason, stopped_by=stopped_by
        )

    def _one(self, token: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Return the text that a token adds, why the answer ends there, and what ended it."""
        text, reason, stopped_by = "", self._reason(token), None
        if token in self._own_ends:
            reason = "stop"
        elif token in self._asked_ends:
            reason, stopped_by = "stop", token
        elif self._text is not None:
            text = self._text.push(token)
        if self._text is not None:
            if reason is not None and self._text.stopped_by is None:
                text += self._text.flush()
            if self._text.stopped_by is not None:
                reason, stopped_by = "stop", self._text.stopped_by
        return text, reason, stopped_by

    def _reason(self, token: int) -> FinishReason | None:
        """Return why the answer ends behind a token that does not end it of itself."""
        goes_round = self._circles.push(token)
        if self._matcher is not None and self._matcher.is_complete:
            return "stop"
        if self._tokens_left == 0:
            return "length"
        return "repetition" if goes_round else None
