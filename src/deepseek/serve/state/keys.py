"""API keys: made, shown once, found again by their digest, revoked.

A secret is 256 random bits, and what is kept is its SHA-256. That is enough: a slow or salted hash
protects words that people choose, which can be guessed; nobody guesses 256 bits at any speed, and
a slow hash would have to be paid for with every request.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable

from sqlalchemy import select, update

from deepseek.errors import ConfigError, describe
from deepseek.serve.state.database import Database
from deepseek.serve.state.errors import NotFoundError
from deepseek.serve.state.tables import KeyRow

_MOST_LETTERS = 256
_MOST_LIMIT = 2**53


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What one key may use; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    concurrency: int | None = None
    """Requests at the same time."""

    def __post_init__(self) -> None:
        """Refuse a limit that nothing fits in."""
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 1 <= value <= _MOST_LIMIT:
                raise ConfigError(describe(name, "KeyLimits", "at least 1, or None", value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key without its secret."""

    id: str
    tenant: str
    """Whose it is. Keys of one tenant share files, batches, responses and cached prompts."""
    name: str
    hint: str
    """How the secret begins and ends, so that its owner knows it again."""
    is_admin: bool
    limits: KeyLimits
    created_at: int
    revoked_at: int | None = None


class KeyStore:
    """The keys of a server."""

    def __init__(
        self,
        database: Database,
        *,
        refresh_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep keys in a database.

        Args:
            database: holds them.
            refresh_s: how old what `find` knows may be: a key that another process revokes is
                refused after so many seconds.
            clock: gives the seconds since 1970.
        """
        self._database = database
        self._refresh_s = refresh_s
        self._clock = clock
        self._live: dict[bytes, ApiKey] = {}
        self._read_at = float("-inf")

    def create(
        self,
        name: str,
        *,
        tenant: str | None = None,
        is_admin: bool = False,
        limits: KeyLimits | None = None,
    ) -> tuple[str, ApiKey]:
        """Make a key and return its secret, which is shown only now, and the key.

        Args:
            name: what people call it, at most 128 characters.
            tenant: whose it is; by default a tenant of its own.
            is_admin: whether it opens the admin routes.
            limits: what it may use; by default without limits.

        Raises:
            ConfigError: the name or the tenant is empty, too long or not printable.
        """
        key_id = f"key-{secrets.token_hex(12)}"
        owner = key_id if tenant is None else tenant
        for what, value in (("name", name), ("tenant", owner)):
            if not 1 <= len(value) <= 128 or not value.isprintable():
                must = "1 to 128 printable characters"
                raise ConfigError(describe(what, "an API key", must, value))
        secret = f"sk-{secrets.token_urlsafe(32)}"
        limits = limits or KeyLimits()
        row = KeyRow(
            id=key_id,
            tenant=owner,
            name=name,
            hint=f"{secret[:6]}…{secret[-4:]}",
            digest=_digest(secret),
            is_admin=is_admin,
            created_at=int(self._clock()),
            **dataclasses.asdict(limits),
        )
        key = _key(row)
        with self._database.write() as session:
            session.add(row)
        self._forget()
        return secret, key

    def revoke(self, key_id: str) -> None:
        """Refuse a key from now on. Revoking again changes nothing.

        Raises:
            NotFoundError: there is no such key.
        """
        with self._database.write() as session:
            row = session.get(KeyRow, key_id)
            if row is None:
                raise NotFoundError("API key", key_id)
            session.execute(
                update(KeyRow)
                .where(KeyRow.id == key_id, KeyRow.revoked_at.is_(None))
                .values(revoked_at=int(self._clock()))
            )
        self._forget()

    def list(self, tenant: str | None = None) -> list[ApiKey]:
        """Return the keys of a tenant or of all, revoked ones too, oldest first."""
        query = select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
        if tenant is not None:
            query = query.where(KeyRow.tenant == tenant)
        with self._database.read() as session:
            return [_key(row) for row in session.scalars(query)]

    def find(self, secret: str) -> ApiKey | None:
        """Return the key of a secret, or None for one that is unknown or revoked.

        How long that takes says nothing of use: it depends on the digest of what was given, whose
        bits nobody can choose, and the digests are compared in constant time.
        """
        if not 0 < len(secret) <= _MOST_LETTERS:
            return None
        if self._clock() - self._read_at >= self._refresh_s:
            self._reload()
        digest = _digest(secret)
        found = self._live.get(digest)
        known = digest if found else bytes(len(digest))
        return found if hmac.compare_digest(known, digest) else None

    def _forget(self) -> None:
        self._read_at = float("-inf")

    def _reload(self) -> None:
        now = self._clock()
        query = select(KeyRow).where(KeyRow.revoked_at.is_(None))
        with self._database.read() as session:
            self._live = {row.digest: _key(row) for row in session.scalars(query)}
        self._read_at = now


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _key(row: KeyRow) -> ApiKey:
    limits = KeyLimits(
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        concurrency=row.concurrency,
    )
    return ApiKey(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        hint=row.hint,
        is_admin=row.is_admin,
        limits=limits,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )
