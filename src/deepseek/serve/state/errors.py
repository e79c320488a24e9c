"""What the stores refuse, beside a setting that cannot be used (ConfigError)."""

from __future__ import annotations

from deepseek.errors import CapacityError, ConfigError


class NotFoundError(ConfigError):
    """There is no such thing, or it belongs to another tenant: which of the two is not told."""

    def __init__(self, kind: str, name: str) -> None:
        """Say what was looked for."""
        super().__init__(f"No such {kind}: {name[:80]!r}.")


class QuotaError(CapacityError):
    """A tenant, or all of them together, would hold more than they may."""
