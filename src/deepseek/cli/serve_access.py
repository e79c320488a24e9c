"""Who may ask a server: keys of the environment and of its state, and from where."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from deepseek.serve.api import Tenant
    from deepseek.serve.api.auth import KeyStore
    from deepseek.serve.durable import DurableState

KEYS_VARIABLE, ADMIN_VARIABLE = "DEEPSEEK_API_KEYS", "DEEPSEEK_ADMIN_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def key_store(args: argparse.Namespace, state: DurableState | None) -> KeyStore:
    """Return where keys are looked up; without any, everybody on this machine may ask.

    Raises:
        ConfigError: there are none, and it would listen to other machines.
    """
    from deepseek.serve.api import MemoryKeyStore, OpenKeyStore
    from deepseek.serve.durable import AllKeys

    holders = _holders()
    stored = None if state is None else state.keys
    if holders or (stored is not None and any(key.revoked_at is None for key in stored.list())):
        return AllKeys(MemoryKeyStore(holders), stored)
    if args.host not in LOOPBACK:
        must = "an address of this machine alone while there are no keys"
        step = "Make one by --add-key NAME, or leave --host away"
        raise ConfigError(describe("--host", "deepseek serve", must, args.host, step))
    return OpenKeyStore()


def _holders() -> dict[str, Tenant]:
    """Return the holders of the keys of the environment, by the keys' hashes."""
    from deepseek.serve.api import Tenant, hash_key

    words = [word.strip() for word in os.environ.get(KEYS_VARIABLE, "").split(",")]
    holders = {
        hash_key(word): Tenant(id=f"key{number}") for number, word in enumerate(words, 1) if word
    }
    admin = os.environ.get(ADMIN_VARIABLE)
    if admin:
        holders[hash_key(admin)] = Tenant(id="admin", is_admin=True)
    return holders
