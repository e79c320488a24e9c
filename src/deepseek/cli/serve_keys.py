"""Keys of a server's state: made, revoked, listed with what they used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deepseek.cli.output import Output
from deepseek.serve.state.database import open_database
from deepseek.serve.state.keys import ApiKey, KeyLimits, KeyStore
from deepseek.serve.state.usage import UsageLedger


def change_keys(args: argparse.Namespace, folder: Path, out: Output) -> int:
    """Do what `--add-key`, `--revoke-key` or `--list-keys` ask for; a server that runs on the same
    state sees it within seconds."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = open_database(args.database or folder / "state.sqlite")
    try:
        keys = KeyStore(database)
        if args.add_key is not None:
            return _add(args, keys, out)
        if args.revoke_key is not None:
            keys.revoke(args.revoke_key)
            out.say(f"{args.revoke_key} is refused from now on.")
            return out.finish({"revoked": args.revoke_key})
        return _list(keys, UsageLedger(database), out)
    finally:
        database.close()


def _add(args: argparse.Namespace, keys: KeyStore, out: Output) -> int:
    limits = KeyLimits(
        requests_per_minute=args.key_requests,
        tokens_per_minute=args.key_tokens,
        concurrency=args.key_concurrency,
    )
    secret, key = keys.create(args.add_key, is_admin=args.key_admin, limits=limits)
    out.say(secret)
    out.note(f"This is {key.id}; the key itself is not shown again.")
    return out.finish({"id": key.id, "key": secret})


def _list(keys: KeyStore, ledger: UsageLedger, out: Output) -> int:
    used: dict[str, int] = {}
    for line in ledger.report():
        total = line.usage.prompt_tokens + line.usage.completion_tokens
        used[line.key_id] = used.get(line.key_id, 0) + total
    ledger.close()
    shown = [_shown(key, used.get(key.tenant, 0)) for key in keys.list()]
    rows = [[str(value) for value in each.values()] for each in shown]
    out.table("Keys", ("id", "name", "hint", "admin", "revoked", "tokens used"), rows)
    return out.finish({"keys": shown})


def _shown(key: ApiKey, used: int) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "hint": key.hint,
        "admin": key.is_admin,
        "revoked": key.revoked_at is not None,
        "tokens": used,
    }
