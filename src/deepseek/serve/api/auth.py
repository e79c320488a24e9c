"""API keys: who calls is known before anything else of a request is looked at."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek.serve.api.context import header, route_path, set_tenant
from deepseek.serve.api.errors import ApiError
from deepseek.serve.api.tenants import Tenant

ADMIN_PREFIX = "/admin"


class KeyStore(Protocol):
    """Where keys are looked up."""

    @property
    def has_admin(self) -> bool:
        """Whether an admin key exists; without one there are no admin routes."""
        ...

    def find(self, key: str | None) -> Tenant | None:
        """Return the holder of a key, or None.

        Args:
            key: as the client sent it; None for none.
        """
        ...


def new_key() -> str:
    """Return a fresh key with 256 bits of chance."""
    return f"sk-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """Return what is kept of a key.

    A plain SHA-256 is enough, because keys are not passwords: nobody can try 2**256 of them, so a
    slow hash would only slow every request down.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class MemoryKeyStore:
    """Keys from the settings."""

    def __init__(self, keys: Mapping[str, Tenant]) -> None:
        """Keep `keys`: hash of a key -> its holder."""
        self._keys = [(digest.encode(), tenant) for digest, tenant in keys.items()]

    @property
    def has_admin(self) -> bool:
        """Whether an admin key exists."""
        return any(tenant.is_admin for _, tenant in self._keys)

    def find(self, key: str | None) -> Tenant | None:
        """Return the holder of a key; the time does not depend on which one it is."""
        digest = hash_key(key or "").encode()
        found: Tenant | None = None
        for kept, tenant in self._keys:
            if hmac.compare_digest(kept, digest):
                found = tenant
        return found if key else None


class OpenKeyStore:
    """No keys: every caller is the same tenant. For a server on loopback with one user."""

    has_admin = False

    def __init__(self, tenant: Tenant | None = None) -> None:
        """Take every caller for `tenant`."""
        self._tenant = tenant or Tenant(id="everyone")

    def find(self, key: str | None) -> Tenant:
        """Return the one tenant."""
        return self._tenant


class Authentication:
    """Lets a request through if its key is known or its path is public; knows no other way in.

    It stands before the router, so a path that no route matches needs a key as well, and nothing in
    how a path is written can lead to a route without one.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyStore, public_paths: frozenset[str]) -> None:
        """Guard `app`."""
        self._app = app
        self._keys = keys
        self._public = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or raise ApiError."""
        path = route_path(scope)
        if path not in self._public:
            tenant = self._keys.find(_bearer(scope))
            if tenant is None:
                raise _no_key()
            is_admin_route = path == ADMIN_PREFIX or path.startswith(f"{ADMIN_PREFIX}/")
            if is_admin_route and self._keys.has_admin and not tenant.is_admin:
                raise ApiError(403, "This key may not do that.", code="admin_only")
            set_tenant(scope, tenant)
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> str | None:
    kind, _, key = header(scope, "authorization").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def _no_key() -> ApiError:
    text = "No valid API key was given. Send it as 'Authorization: Bearer KEY'."
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, text, code="invalid_api_key", headers=headers)
