"""What the engine refuses or fails with, besides the errors of every room."""

from __future__ import annotations

from deepseek.errors import BackendError, CapacityError


class QueueFull(CapacityError):
    """Too many requests wait; `retry_after_s` says when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Say how long the queue is, and for how long."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(CapacityError):
    """The answer cannot come in time, or did not."""


class EngineError(BackendError):
    """The engine died; what was under way is lost."""
