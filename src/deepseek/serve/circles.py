"""Finds a text that goes round in circles: it repeats its last tokens exactly, and does not end."""

from __future__ import annotations

MAX_PERIOD = 64
"""Longest piece whose repetition is seen."""
_EVERY = 32


class CircleDetector:
    """Tells when the last tokens are one piece of at most 64 tokens, over and over.

    Args:
        longest: tokens of repetition that are still let pass; 0 lets everything pass.
    """

    def __init__(self, longest: int) -> None:
        self._longest = max(longest, 2 * MAX_PERIOD) if longest else 0
        self._tokens: list[int] = []

    def push(self, token: int) -> bool:
        """Take one more token; return whether the text goes round in circles.

        It looks once in 32 tokens, so the answer may come that much later.
        """
        if not self._longest:
            return False
        self._tokens.append(token)
        if len(self._tokens) < self._longest or len(self._tokens) % _EVERY:
            return False
        last = self._tokens = self._tokens[-self._longest - _EVERY :]
        last = last[-self._longest :]
        return any(
            last[-1] == last[-1 - period] and last[period:] == last[:-period]
            for period in range(1, MAX_PERIOD + 1)
        )
