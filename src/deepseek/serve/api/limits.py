"""How much a tenant may ask: requests and tokens a minute, and requests at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek.serve.api.context import find_tenant
from deepseek.serve.api.errors import ApiError, bad_request
from deepseek.serve.api.tenants import Tenant

Clock = Callable[[], float]
"""Seconds from some fixed moment."""

_BUSY_RETRY_S = 1.0
"""When to come back for a place among one's own requests: nobody knows when one ends."""


class TokenBucket:
    """Holds a minute's worth of something, and fills at that rate."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        """Start full."""
        self.capacity = float(per_minute)
        self._level = self.capacity
        self._clock = clock
        self._filled_at = clock()

    def take(self, amount: float) -> float:
        """Take `amount` and return 0, or take nothing and return the seconds until it is there."""
        now = self._clock()
        gained = max(0.0, now - self._filled_at) * self.capacity / 60
        self._level = min(self.capacity, self._level + gained)
        self._filled_at = now
        if amount <= self._level:
            self._level -= amount
            return 0.0
        return (amount - self._level) * 60 / self.capacity

    def give_back(self, amount: float) -> None:
        """Put back what was taken and not used."""
        self._level = min(self.capacity, self._level + amount)


class _Usage:
    """What one tenant has under way."""

    def __init__(self, tenant: Tenant, clock: Clock) -> None:
        limits = tenant.limits
        per_minute = (limits.requests_per_minute, limits.tokens_per_minute)
        self.requests, self.tokens = (
            None if rate is None else TokenBucket(rate, clock) for rate in per_minute
        )
        self.limits = limits
        self.running = 0


class Charge:
    """Tokens that were charged at admission, until it is known how many were used."""

    def __init__(self, bucket: TokenBucket | None, amount: int) -> None:
        """Note what was taken from `bucket`."""
        self._bucket = bucket
        self._amount = amount

    def settle(self, used: int) -> None:
        """Give back what was not used; a second call does nothing."""
        if self._bucket is not None:
            self._bucket.give_back(max(0, self._amount - used))
        self._bucket = None


class Quotas:
    """The limits of all tenants. One event loop uses it."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """Start with nothing used."""
        self._clock = clock
        self._usages: dict[str, _Usage] = {}

    def enter(self, tenant: Tenant) -> None:
        """Count one more request under way.

        Raises:
            ApiError: 429, with the seconds to wait.
        """
        usage = self._usage(tenant)
        most = usage.limits.concurrency
        if most is not None and usage.running >= most:
            raise _too_many(f"This key may have {most} requests under way.", _BUSY_RETRY_S)
        wait_s = usage.requests.take(1) if usage.requests else 0.0
        if wait_s:
            rate = usage.limits.requests_per_minute
            raise _too_many(f"This key may send {rate} requests a minute.", wait_s)
        usage.running += 1

    def leave(self, tenant: Tenant) -> None:
        """Count one request less under way."""
        self._usage(tenant).running -= 1

    def charge(self, tenant: Tenant, tokens: int) -> Charge:
        """Charge the most tokens that a request can use.

        Raises:
            ApiError: 429, with the seconds to wait; 400 where no wait would help.
        """
        bucket = self._usage(tenant).tokens
        if bucket is not None and tokens > bucket.capacity:
            text = f"The request may use {tokens} tokens; this key has {bucket.capacity:.0f} a"
            raise bad_request(f"{text} minute. Lower max_tokens or n.", "max_tokens")
        wait_s = bucket.take(tokens) if bucket else 0.0
        if wait_s:
            rate = self._usage(tenant).limits.tokens_per_minute
            raise _too_many(f"This key may use {rate} tokens a minute.", wait_s)
        return Charge(bucket, tokens)

    def _usage(self, tenant: Tenant) -> _Usage:
        usage = self._usages.get(tenant.id)
        if usage is None or usage.limits != tenant.limits:
            running = usage.running if usage else 0
            usage = self._usages[tenant.id] = _Usage(tenant, self._clock)
            usage.running = running
        return usage


class QuotaGuard:
    """Counts the requests of a tenant, from its headers to the end of its answer."""

    def __init__(self, app: ASGIApp, *, quotas: Quotas) -> None:
        """Guard `app`."""
        self._app = app
        self._quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or raise ApiError."""
        tenant = find_tenant(scope)
        if tenant is None:
            await self._app(scope, receive, send)
            return
        self._quotas.enter(tenant)
        try:
            await self._app(scope, receive, send)
        finally:
            self._quotas.leave(tenant)


def _too_many(message: str, retry_after_s: float) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)
