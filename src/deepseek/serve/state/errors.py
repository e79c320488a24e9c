"""What the stores refuse because of what a client asks; other errors are the server's trouble."""

from __future__ import annotations

from typing import Any

from deepseek.errors import CapacityError, ConfigError, describe


class RequestError(ConfigError):
    """A value in a request is not one that can be used."""

    def __init__(self, param: str, owner: str, must: str, got: Any, next_step: str = "") -> None:
        """Say what is wrong as `deepseek.errors.describe` does; `param` is the field."""
        super().__init__(describe(param, owner, must, got, next_step))
        self.param = param


class NotFoundError(ConfigError):
    """There is no such thing, or it belongs to another tenant: which of the two is not told."""

    def __init__(self, kind: str, name: str) -> None:
        """Say what was looked for."""
        super().__init__(f"No such {kind}: {name[:80]!r}.")


class QuotaError(CapacityError):
    """A tenant, or all of them together, would hold more than they may."""

    def __init__(self, message: str, *, is_passing: bool = False) -> None:
        """Say what is full, and whether waiting helps."""
        super().__init__(message)
        self.is_passing = is_passing
