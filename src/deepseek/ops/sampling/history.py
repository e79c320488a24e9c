"""What penalties need to know about the tokens so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class TokenHistory:
    """Which tokens each row has had: kept up to date one token at a time."""

    seen: Tensor
    """bool [rows, vocab]: the token is in the prompt or the answer."""
    counts: Tensor
    """float32 [rows, vocab]: how often the token is in the answer."""

    @classmethod
    def of_prompts(
        cls,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> TokenHistory:
        """Return the history of rows that have a prompt and no answer yet.

        Args:
            prompts: token ids below `vocab_size`, one sequence a row.
            vocab_size: columns of the logits.
            device: where the logits will be.
        """
        seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, torch.as_tensor(prompt, dtype=torch.long)] = True
        counts = torch.zeros(len(prompts), vocab_size)
        return cls(seen.to(device), counts.to(device))

    def add(self, tokens: Tensor) -> None:
        """Count one more token of each row's answer: int64 [rows]."""
        column = tokens[:, None]
        self.seen.scatter_(1, column, True)
        self.counts.scatter_add_(1, column, torch.ones_like(column, dtype=self.counts.dtype))

    def select(self, rows: Sequence[int]) -> TokenHistory:
        """Return the history of some rows."""
        return TokenHistory(self.seen[list(rows)], self.counts[list(rows)])
