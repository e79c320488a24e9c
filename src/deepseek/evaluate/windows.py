"""Sliding windows over a long text: every token is scored once, in context."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import CausalModel, device_of, max_positions_of

DEFAULT_WINDOW = 1024
_TOKENS_PER_BATCH = 2048


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of a text are seen; those from `scored` on are scored."""

    begin: int
    end: int
    scored: int

    @property
    def shape(self) -> tuple[int, int]:
        """Length and number of tokens scored: windows of one shape can share a batch."""
        return self.end - self.begin, self.end - self.scored


def plan_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Return the windows that score every token but the first exactly once.

    The first window scores all of its tokens but the first, which nothing precedes; each later one
    begins `stride` tokens further on and scores the tokens that none before it did, with at least
    `window - stride` before them.

    Args:
        num_tokens: length of the text; below two there is nothing to score.
        window: tokens that the model sees at once, at least 2.
        stride: 1 to `window - 1`. Small = more context for each token and more work (window /
            stride passes).

    Raises:
        ConfigError: `window` or `stride` is out of range.

    Source: "Perplexity of fixed-length models" in the documentation of transformers.
    """
    if window < 2:
        raise ConfigError(describe("window", "plan_windows", "at least 2 tokens", window))
    if not 1 <= stride < window:
        step = "With stride = window the first token of each window would have no context"
        raise ConfigError(
            describe("stride", "plan_windows", f"1 to {window - 1} (window - 1)", stride, step)
        )
    windows: list[Window] = []
    scored = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        if scored < end:
            windows.append(Window(begin, end, scored))
        scored = end
        if end == num_tokens:
            break
    return windows


def window_and_stride(
    model: CausalModel, window: int | None, stride: int | None
) -> tuple[int, int]:
    """Return the window and stride asked for.

    The window is else 1024 tokens, or the model's length if shorter; the stride half of it.

    Raises:
        ConfigError: the window is longer than the model was made for.
    """
    limit = max_positions_of(model)
    if window is None:
        window = DEFAULT_WINDOW if limit is None else min(DEFAULT_WINDOW, limit)
    if limit is not None and window > limit:
        raise ConfigError(
            describe("window", type(model).__name__, f"at most {limit} tokens, its length", window)
        )
    return window, max(1, window // 2) if stride is None else stride


def window_batches(
    windows: Sequence[Window], batch_size: int | None = None
) -> Iterator[tuple[list[Window], tuple[int, int]]]:
    """Yield neighbouring windows of one shape together, with that shape; no row is padded.

    Args:
        windows: from `plan_windows`.
        batch_size: most windows a batch; None = as many as have 2048 tokens together, which bounds
            the logits at 2048 x vocabulary.
    """
    pending: list[Window] = []
    for window in windows:
        most = batch_size or max(1, _TOKENS_PER_BATCH // window.shape[0])
        if pending and (window.shape != pending[0].shape or len(pending) >= most):
            yield pending, pending[0].shape
            pending = []
        pending.append(window)
    if pending:
        yield pending, pending[0].shape


def batch_ids(model: CausalModel, ids: Tensor, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, T] of windows of one shape, on the model's device, and targets."""
    rows = torch.stack([ids[window.begin : window.end] for window in windows])
    targets = rows[:, -windows[0].shape[1] :]
    return rows.to(device_of(model)), targets
