"""Keys are shown once, kept as digests, found in constant time, and refused once revoked."""

from __future__ import annotations

import hmac
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.errors import NotFoundError
from deepseek.serve.state.keys import KeyLimits, KeyStore
from tests.serve.state.clock import Clock


def test_a_key_is_found_by_its_secret_only(database: Database) -> None:
    store = KeyStore(database)
    limits = KeyLimits(requests_per_minute=60, tokens_per_minute=100_000, concurrency=4)
    secret, key = store.create("ci", tenant="team", is_admin=True, limits=limits)
    assert store.find(secret) == key
    assert key.limits == limits and key.is_admin and key.tenant == "team"
    for wrong in (
        secret[:-1],
        secret + "a",
        secret.upper(),
        "",
        "sk-",
        key.id,
        "\ud800",
        "a" * 9999,
    ):
        assert store.find(wrong) is None


def test_the_secret_is_256_random_bits_and_is_not_kept(tmp_path: Path) -> None:
    database = open_database(tmp_path / "state.db")
    made = [KeyStore(database).create(f"key {number}") for number in range(64)]
    database.close()
    on_disk = (tmp_path / "state.db").read_bytes()
    for secret, key in made:
        assert math.log2(64) * len(secret.removeprefix("sk-")) >= 256
        assert secret.encode() not in on_disk and secret[6:-4].encode() not in on_disk
        assert secret.startswith(key.hint.split("…")[0]) and secret.endswith(key.hint.split("…")[1])
    assert len({secret for secret, _ in made}) == 64
    assert len({key.tenant for _, key in made}) == 64, "by default nobody shares"


def test_every_look_up_compares_two_digests(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KeyStore(database)
    secret, _ = store.create("ci")
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert store.find(secret) is not None
    assert store.find("sk-unknown") is None
    assert [len(left) for pair in compared for left in pair] == [32] * 4


def test_a_revoked_key_is_refused_at_once_here_and_soon_elsewhere(
    database: Database, clock: Clock
) -> None:
    here = KeyStore(database, clock=clock)
    there = KeyStore(database, clock=clock, refresh_s=5.0)
    secret, key = here.create("ci")
    assert here.find(secret) == there.find(secret) == key
    here.revoke(key.id)
    assert here.find(secret) is None
    clock.now += 4.9
    assert there.find(secret) == key
    clock.now += 0.2
    assert there.find(secret) is None
    first = here.list()[0].revoked_at
    clock.now += 100
    here.revoke(key.id)
    assert here.list()[0].revoked_at == first == 1_800_000_000
    with pytest.raises(NotFoundError, match="No such API key"):
        here.revoke("key-none")


def test_keys_are_listed_by_tenant(database: Database, clock: Clock) -> None:
    store = KeyStore(database, clock=clock)
    for name, tenant in (("a", "one"), ("b", "two"), ("c", "one")):
        store.create(name, tenant=tenant)
        clock.now += 1
    assert [key.name for key in store.list()] == ["a", "b", "c"]
    assert [key.name for key in store.list("one")] == ["a", "c"]


@pytest.mark.parametrize("name", ["", "a" * 129, "line\nbreak", "\0"])
def test_names_are_bounded(database: Database, name: str) -> None:
    with pytest.raises(ConfigError, match="name of an API key must be 1 to 128"):
        KeyStore(database).create(name)
    with pytest.raises(ConfigError, match="tenant of an API key must be 1 to 128"):
        KeyStore(database).create("fine", tenant=name)


@given(st.integers(max_value=0) | st.integers(min_value=2**53 + 1))
def test_limits_are_bounded(value: int) -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        with pytest.raises(ConfigError, match=name):
            KeyLimits(**{name: value})
