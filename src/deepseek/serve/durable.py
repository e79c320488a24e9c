"""What a server keeps between its runs: keys, usage, files, batches, responses."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from deepseek.errors import ConfigError, describe
from deepseek.records import Event
from deepseek.serve.api.auth import KeyStore as Keys
from deepseek.serve.api.tenants import Tenant, TenantLimits
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.database import open_database
from deepseek.serve.state.files import FileStore
from deepseek.serve.state.keys import ApiKey, KeyStore
from deepseek.serve.state.responses import ResponseStore
from deepseek.serve.state.usage import Usage, UsageLedger

FAILED = ("error", "deadline")


class DurableState:
    """The state of one server; no other server may work on it at the same time.

    Args:
        folder: made where it is missing; the contents of files lie in it.
        url: of a PostgreSQL database; None for SQLite in the folder.

    Raises:
        ConfigError: another server has it.
        FormatError: the database is damaged, or made by a newer version.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            must, step = "one that no other server has", "Give another folder by --state"
            raise ConfigError(describe("state", "the server", must, str(folder), step)) from error
        try:
            self._database = open_database(url or folder / "state.sqlite")
        except BaseException:
            os.close(self._lock)
            raise
        self.keys = KeyStore(self._database)
        self.usage = UsageLedger(self._database)
        self.files = FileStore(self._database, folder / "files")
        self.batches = BatchStore(self.files)
        self.responses = ResponseStore(self._database)

    def count(self, event: Event) -> None:
        """Add an answer that has ended to its tenant's usage."""
        used = Usage(
            prompt_tokens=event.num_prompt_tokens if event.choice == 0 else 0,
            cached_tokens=event.num_cached_tokens if event.choice == 0 else 0,
            completion_tokens=event.num_tokens,
            requests=int(event.choice == 0),
            errors=int(event.choice == 0 and event.finish_reason in FAILED),
        )
        self.usage.add(event.tenant, event.model, used)

    def close(self) -> None:
        """Write what is left, and let another server have it."""
        self.usage.close()
        self._database.close()
        os.close(self._lock)


class AllKeys:
    """Keys of the environment, and those of a database. Is a `KeyStore` of the API.

    Args:
        first: looked up first.
        stored: looked up then; None for none.
    """

    def __init__(self, first: Keys, stored: KeyStore | None) -> None:
        self._first, self._stored = first, stored

    @property
    def has_admin(self) -> bool:
        """Whether an admin key exists."""
        stored = self._stored.list() if self._stored is not None else []
        return self._first.has_admin or any(key.is_admin and not key.revoked_at for key in stored)

    def find(self, key: str | None) -> Tenant | None:
        """Return the holder of a key, or None."""
        found = self._first.find(key)
        if found is not None or key is None or self._stored is None:
            return found
        stored = self._stored.find(key)
        return None if stored is None else tenant_of_key(stored)


def tenant_of_key(key: ApiKey) -> Tenant:
    """Return the holder of a stored key, as the API knows it."""
    limits = TenantLimits(
        requests_per_minute=key.limits.requests_per_minute,
        tokens_per_minute=key.limits.tokens_per_minute,
        concurrency=key.limits.concurrency,
    )
    return Tenant(id=key.tenant, name=key.name, limits=limits, is_admin=key.is_admin)
