"""Databases are brought up to date, and every broken one is refused in one clear sentence."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_mock_engine, inspect, select, text

from deepseek.errors import BackendError, CapacityError, ConfigError, FormatError
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.keys import KeyStore
from deepseek.serve.state.tables import Base, KeyRow


def test_migrations_and_models_agree(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    tables = set(inspect(database.engine).get_table_names())
    assert tables == {*Base.metadata.tables, "alembic_version"}


def test_tables_can_be_made_in_postgresql() -> None:
    made: list[str] = []
    engine = create_mock_engine(
        "postgresql+psycopg://", lambda sql, *_, **__: made.append(str(sql.compile(engine)))
    )
    Base.metadata.create_all(engine, checkfirst=False)
    text = "\n".join(made)
    assert text.count("CREATE TABLE") == len(Base.metadata.tables)
    assert text.count("number BIGSERIAL NOT NULL") == 3


def test_data_and_version_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.db"
    first = open_database(path)
    secret, key = KeyStore(first).create("ci")
    first.close()
    second = open_database(f"sqlite:///{path}")
    assert KeyStore(second).find(secret) == key
    second.close()


def test_commits_reach_the_disk_and_only_the_owner_reads(tmp_path: Path) -> None:
    database = open_database(tmp_path / "state.db")
    with database.read() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert session.execute(text("PRAGMA synchronous")).scalar() == 2
    with database.write() as session:
        session.execute(text("CREATE TABLE x (y)"))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    database.close()


def test_an_error_in_a_write_leaves_nothing(database: Database) -> None:
    with pytest.raises(KeyError), database.write() as session:
        session.add(_key_row("a"))
        session.flush()
        raise KeyError
    with database.read() as session:
        assert session.scalars(select(KeyRow)).all() == []


def test_writers_take_turns(database: Database) -> None:
    with database.write() as session:
        session.execute(text("CREATE TABLE count (value INTEGER)"))
        session.execute(text("INSERT INTO count VALUES (0)"))

    def grow() -> None:
        for _ in range(20):
            with database.write() as session:
                value = session.execute(text("SELECT value FROM count")).scalar_one()
                session.execute(text("UPDATE count SET value = :value"), {"value": value + 1})

    threads = [threading.Thread(target=grow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.execute(text("SELECT value FROM count")).scalar_one() == 80


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database = open_database(path)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(FormatError, match=r"version of .*'9999'.*Upgrade deepseek-stack"):
        open_database(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database at all\n" * 300)
    with pytest.raises(FormatError, match="an undamaged database"):
        open_database(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_database_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "state.db"
    database = open_database(path)
    with database.write() as session:
        session.add_all(_key_row(f"{number:04}") for number in range(500))
    database.close()
    assert not path.with_name("state.db-wal").exists()
    os.truncate(path, int(path.stat().st_size * share) // 4096 * 4096)
    with pytest.raises(FormatError, match="an undamaged database"):
        open_database(path)


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database = open_database(path)
    with database.write() as session:
        session.add_all(_key_row(f"{number:04}") for number in range(500))
    database.close()
    content = bytearray(path.read_bytes())
    for start in range(8192, len(content), 4096):
        content[start : start + 64] = b"\xa5" * 64
    path.write_bytes(content)
    with pytest.raises(FormatError, match="an undamaged database"):
        open_database(path)


def test_damage_that_nobody_has_met_yet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    open_database(path).close()
    with path.open("r+b") as file:
        # The number of free pages, of which there are none.
        file.seek(36)
        file.write((5).to_bytes(4, "big"))
    with pytest.raises(FormatError, match=r"an undamaged database; got .*freelist"):
        open_database(path)


def test_a_locked_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    open_database(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BackendError, match=r"lock of .* must be free"):
        open_database(path, busy_timeout_s=0.05)
    other.execute("ROLLBACK")
    other.close()
    open_database(path).close()


def test_a_full_disk_is_told_and_what_was_there_stays(database: Database) -> None:
    store = KeyStore(database)
    secret, key = store.create("before")
    with database.write() as session:
        session.add_all(_key_row(f"{number:04}") for number in range(50))
    # SQLite's own limit gives the error of a full disk.
    with database.engine.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
    database.engine.dispose()
    with _most_pages(database, int(pages)):
        with (
            pytest.raises(CapacityError, match=r"disk of .*Free some space"),
            database.write() as it,
        ):
            it.add_all(_key_row(f"late-{number:04}") for number in range(500))
        assert KeyStore(database).find(secret) == key
    with database.read() as session:
        assert len(session.scalars(select(KeyRow)).all()) == 51


@contextlib.contextmanager
def _most_pages(database: Database, pages: int) -> Iterator[None]:
    from sqlalchemy import event

    def limit(connection: sqlite3.Connection, record: object) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(database.engine, "connect", limit)
    yield
    event.remove(database.engine, "connect", limit)
    database.engine.dispose()


@contextlib.contextmanager
def _unprivileged() -> Iterator[None]:
    """Give up what lets the administrator write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        with _unprivileged(), pytest.raises(ConfigError, match="one that can be written to"):
            open_database(folder / "state.db")
        with _unprivileged(), pytest.raises(ConfigError, match="one that can be written to"):
            open_database(folder / "deep" / "state.db")


def test_a_read_only_file_is_refused(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "state.db")
        open_database(path).close()
        path.chmod(0o444)
        Path(name).chmod(0o555)
        with _unprivileged(), pytest.raises(ConfigError, match="one that can be"):
            open_database(path)


@pytest.mark.parametrize(
    "address", ["mysql://host/name", "sqlite://", "sqlite:///:memory:", "http://x", "://", "a://["]
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="address of the database"):
        open_database(address)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one that can be read and written"):
        open_database(tmp_path)


def test_a_server_that_does_not_answer_is_told() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(BackendError, match="one that answers") as caught:
        open_database("postgresql://user:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(caught.value)


def _key_row(name: str) -> KeyRow:
    return KeyRow(
        id=name,
        tenant="t",
        name=name,
        hint="sk-…",
        digest=name.encode().ljust(32),
        is_admin=False,
        created_at=0,
    )
