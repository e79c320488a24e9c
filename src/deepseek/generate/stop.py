"""Where a text ends: stop strings that may span token borders."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek.data import IncrementalDecoder, Tokenizer


class StopMatcher:
    """Lets text through up to the first stop string; holds back what could be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        """Take more text and return what is certainly not part of a stop string."""
        if not self._stops:
            return text
        self._held += text
        places = ((self._held.find(stop), stop) for stop in self._stops)
        found = [(place + len(stop), place, stop) for place, stop in places if place >= 0]
        if found:
            # of several, the one that is complete first, so that borders of pieces do not matter
            _, place, self.stopped_by = min(found)
            passed, self._held = self._held[:place], ""
            return passed
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        """Return what was held back: the text ended before it became a stop string."""
        passed, self._held = self._held, ""
        return passed


class TextStream:
    """The text of one row as its tokens come: decoded, and cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        """Start an empty text that ends at any of `stops`."""
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stops)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was met; it and what follows are not in the text."""
        return self._matcher.stopped_by

    def push(self, token_id: int) -> str:
        """Take one more token and return the text that is settled."""
        text = self._decoder.push(token_id)
        return self._matcher.push(text) if text else ""

    def flush(self) -> str:
        """Return the rest of the text."""
        text = self._matcher.push(self._decoder.flush())
        return text + self._matcher.flush()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
