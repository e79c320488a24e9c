"""Files are whole or not there, belong to one tenant, keep their bounds, and go in time."""

from __future__ import annotations

import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import CapacityError, ConfigError
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.errors import NotFoundError, QuotaError
from deepseek.serve.state.files import FileLimits, FileStore, StoredFile
from tests.serve.state.clock import Clock

HOUR = 3600


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def store(database: Database, folder: Path, clock: Clock) -> FileStore:
    limits = FileLimits(file_bytes=1000, tenant_bytes=1500, total_bytes=2000, tenant_files=5)
    return FileStore(database, folder, limits, clock=clock)


def put(store: FileStore, tenant: str = "a", size: int = 10, **more: object) -> StoredFile:
    """Keep a file of so many bytes."""
    return store.create(tenant, "input.jsonl", "batch", [b"x" * size], **more)  # type: ignore[arg-type]


def test_a_file_is_kept_under_a_name_of_ours(store: FileStore, folder: Path) -> None:
    made = store.create("a", "../../etc/passwd\n", "user_data", [b"one", b"", b"two"])
    assert store.open_path("a", made.id).read_bytes() == b"onetwo"
    assert [path.name for path in folder.iterdir()] == [made.id]
    assert stat.S_IMODE((folder / made.id).stat().st_mode) == 0o600
    assert store.get("a", made.id).to_dict() == {
        "id": made.id,
        "object": "file",
        "bytes": 6,
        "created_at": 1_800_000_000,
        "expires_at": 1_800_000_000 + 30 * 24 * HOUR,
        "filename": "../../etc/passwd",
        "purpose": "user_data",
        "status": "processed",
        "status_details": None,
    }


@pytest.mark.parametrize(
    "name",
    ["", ".", "../state.db", "/etc/passwd", "file-", "file-" + "0" * 32, "file-\0", "f" * 10_000],
)
def test_nothing_but_ids_of_this_registry_is_opened(store: FileStore, name: str) -> None:
    for ask in (store.get, store.open_path, store.delete):
        with pytest.raises(NotFoundError, match="No such file"):
            ask("a", name)


def test_another_tenants_file_is_not_there(store: FileStore) -> None:
    made = put(store)
    for ask in (store.get, store.open_path, store.delete):
        with pytest.raises(NotFoundError):
            ask("b", made.id)
    with pytest.raises(NotFoundError):
        store.list("b", after=made.id)
    assert store.list("b") == ([], False)
    assert store.get("a", made.id) == made


def test_lists_come_in_pages(store: FileStore) -> None:
    made = [put(store, size=1) for _ in range(5)]
    newest, more = store.list("a", limit=2)
    assert newest == [made[4], made[3]] and more
    assert store.list("a", limit=3, after=made[3].id) == ([made[2], made[1], made[0]], False)
    assert store.list("a", limit=2, after=made[1].id, order="asc") == ([made[2], made[3]], True)
    assert store.list("a", purpose="vision") == ([], False)


def test_quotas_hold(store: FileStore, folder: Path) -> None:
    with pytest.raises(QuotaError, match="size of the file must be at most 1000 bytes"):
        put(store, size=1001)
    put(store, size=1000)
    with pytest.raises(QuotaError, match="size of your files must be at most 1500 bytes"):
        put(store, size=501)
    put(store, size=500)
    with pytest.raises(QuotaError, match="room of the server's files"):
        put(store, "b", size=501)
    put(store, "b", size=500)
    with pytest.raises(QuotaError, match="room of the server's files"):
        put(store, "c", size=1)
    assert sum(path.stat().st_size for path in folder.iterdir()) == 2000


def test_the_number_of_files_is_bounded(store: FileStore) -> None:
    made = [put(store, size=0) for _ in range(5)]
    with pytest.raises(QuotaError, match="number of your files must be at most 5"):
        put(store, size=0)
    store.delete("a", made[0].id)
    put(store, size=0)


def test_reading_stops_at_the_quota(store: FileStore) -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 100
            yield b"x" * 100

    with pytest.raises(QuotaError):
        store.create("a", "name", "batch", endless())
    assert read == 1100


def test_files_go_when_their_time_has_passed(store: FileStore, folder: Path, clock: Clock) -> None:
    short, long = put(store, ttl_s=HOUR), put(store)
    clock.now += HOUR - 1
    assert store.get("a", short.id) == short
    clock.now += 1
    with pytest.raises(NotFoundError):
        store.get("a", short.id)
    assert store.list("a") == ([long], False)
    assert store.sweep() == 1 and store.sweep() == 0
    assert [path.name for path in folder.iterdir()] == [long.id]


@given(st.integers(max_value=HOUR - 1) | st.integers(min_value=30 * 24 * HOUR + 1))
def test_times_are_bounded(ttl_s: int) -> None:
    from deepseek.serve.state.files import check_ttl

    with pytest.raises(ConfigError, match=r"expires_after.seconds of a file"):
        check_ttl(ttl_s)


def test_purposes_are_openais(store: FileStore) -> None:
    with pytest.raises(ConfigError, match="purpose of a file must be one of assistants, batch"):
        store.create("a", "name", "batch_output", [b""])


@given(st.text())
def test_names_become_printable(name: str) -> None:
    from deepseek.serve.state.files import _shown_name

    shown = _shown_name(name)
    assert 1 <= len(shown) <= 255 and shown.isprintable()


def test_what_fails_leaves_nothing(store: FileStore, folder: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.create("a", "name", "batch", broken())
    assert list(folder.iterdir()) == [] and store.list("a") == ([], False)


def test_a_full_disk_leaves_nothing(store: FileStore, folder: Path) -> None:
    # A limit on the size of any file gives the error of a full disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(CapacityError, match=r"disk of .* must be large enough"):
            put(store, size=600)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(folder.iterdir()) == []
    put(store, size=600)


def test_leftovers_of_a_kill_are_removed_at_a_later_start(
    store: FileStore, database: Database, folder: Path
) -> None:
    kept = put(store)
    for name in ("file-" + "1" * 32, ".file-" + "2" * 32 + ".new", kept.id):
        (folder / name).write_bytes(b"x")
        old = time.time() - 2 * HOUR
        os.utime(folder / name, (old, old))
    (folder / ("file-" + "3" * 32)).write_bytes(b"another process is about to enter it")
    FileStore(database, folder)
    assert {path.name for path in folder.iterdir()} == {kept.id, "file-" + "3" * 32}


def test_files_survive_reopening(tmp_path: Path, folder: Path) -> None:
    first = open_database(tmp_path / "other.db")
    made = FileStore(first, folder).create("a", "name", "batch", [b"content"])
    first.close()
    second = open_database(tmp_path / "other.db")
    assert FileStore(second, folder).open_path("a", made.id).read_bytes() == b"content"
    second.close()
