"""What generation gives: pieces while it runs, completions when it is done."""

from __future__ import annotations

import dataclasses
from typing import Literal

FinishReason = Literal["stop", "length"]
"""`stop`: a token or string that ends the text; `length`: `max_tokens` or the context is full."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One token of one row, with the text that it completed."""

    row: int
    """Number of the prompt."""
    text: str
    """Whole characters only; empty while a character or a possible stop string is incomplete."""
    token_id: int
    finish_reason: FinishReason | None
    """Set on the row's last piece."""
    depth: int | None = None
    """Layers behind which the token was chosen; None where every token goes through all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to one prompt."""

    text: str
    """Without what ended it, and without special tokens; empty when there is no tokenizer."""
    token_ids: tuple[int, ...]
    """Every token the model gave, the one that ended the text included."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    first_token_s: float
    """Seconds from the call to the row's first token."""
    total_s: float
    """Seconds from the call to the row's last token; the rows of a batch run together."""
    depths: tuple[int, ...] | None = None
    """Layers behind which each token was chosen; None where every token goes through all."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of this row per second of the whole call, the prompt's reading included."""
        return len(self.token_ids) / self.total_s if self.total_s > 0 else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return the fields and `tokens_per_s` as JSON-ready values."""
        values = dataclasses.asdict(self)
        values["token_ids"] = list(self.token_ids)
        values["depths"] = None if self.depths is None else list(self.depths)
        return {**values, "tokens_per_s": self.tokens_per_s}
