"""Who calls, and how much they may ask."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TenantLimits:
    """How much a tenant may ask; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers; an answer's `max_tokens` is charged until it has ended."""
    concurrency: int | None = None
    """Requests that may be under way at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tenant:
    """The holder of one or more keys: what usage, limits and cached pages are counted by."""

    id: str
    name: str = ""
    limits: TenantLimits = TenantLimits()
    is_admin: bool = False
    """Whether the admin routes are open to it."""
