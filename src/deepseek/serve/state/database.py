"""The database: opened, checked and brought up to date; one writer at a time; every commit on disk.

SQLite runs in WAL mode, so readers never wait, with `synchronous=FULL`: what a commit has answered
survives a power cut. Calls block for as long as the disk takes; asynchronous code calls them in a
thread.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session

from deepseek.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    DeepseekError,
    FormatError,
    describe,
    missing_extra,
)
from deepseek.hub.atomic import writing

_ONE_WRITER = 0x64656570
"""Names the lock that writers of one PostgreSQL database take in turn."""


class Database:
    """A database that is up to date. Made by `open_database`; safe to use from many threads."""

    def __init__(self, engine: Engine, name: str) -> None:
        """Take an engine whose tables are as in `tables`; `name` is what errors call it."""
        self.name = name
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._writers = engine.execution_options(writes=True)
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session that sees one state of the database."""
        with explained(self.name), Session(self.engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session that nobody writes beside; committed at the end, or not at all after an
        error.

        Raises:
            CapacityError: the disk is full.
            BackendError: another process has held the database for too long, or it is gone.
        """
        with explained(self.name), self._turn, Session(self._writers) as session, session.begin():
            if not self.is_sqlite:
                session.execute(text(f"SELECT pg_advisory_xact_lock({_ONE_WRITER})"))
            yield session

    def insert(self, table: type[Any]) -> sqlite.Insert | postgresql.Insert:
        """Return an INSERT that knows ON CONFLICT, which each dialect has in its own module."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def open_database(place: str | Path, *, busy_timeout_s: float = 10.0) -> Database:
    """Open a database, making it where there is none, and bring its tables up to date.

    Args:
        place: the path of an SQLite file, or a URL (`sqlite:///…`, `postgresql://…`).
        busy_timeout_s: how long to wait for another process that writes.

    Raises:
        ConfigError: the place cannot be read and written.
        FormatError: not a database, damaged, or made by a newer release.
        CapacityError: the disk is full.
        BackendError: another process holds it, or the server does not answer.
        MissingExtra: PostgreSQL is wanted and its driver is not installed.
    """
    url = _url(place)
    name = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite":
        _make_file(url)
        engine = create_engine(url, connect_args={"timeout": busy_timeout_s})
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
    else:
        engine = _postgresql(url, busy_timeout_s)
    database = Database(engine, name)
    try:
        with database.write() as session:
            _check(session, name)
            upgrade(session.connection(), name)
    except BaseException:
        engine.dispose()
        raise
    return database


def upgrade(connection: Connection, name: str) -> None:
    """Run the steps that a database has not seen, inside the transaction of the connection.

    Raises:
        FormatError: the database has seen steps of a newer release.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    seen = set(MigrationContext.configure(connection).get_current_heads())
    if not seen <= known:
        must, got = "a version that this release knows", sorted(seen - known)
        step = "Upgrade deepseek-stack, or give another database"
        raise FormatError(describe("version", name, must, got, step))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn a driver's errors into ours."""
    try:
        yield
    except DBAPIError as error:
        raise _translated(error, name) from error


def _url(place: str | Path) -> URL:
    if isinstance(place, Path) or "://" not in place:
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(place)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError) as error:
        must = "a path, sqlite:///PATH or postgresql://HOST/NAME"
        raise ConfigError(describe("address", "the database", must, place[:40])) from error
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or not url.database or url.database == ":memory:":
        must = "an SQLite file or a PostgreSQL server"
        raise ConfigError(describe("address", "the database", must, backend))
    return url


def _make_file(url: URL) -> None:
    """Make the file before SQLite does, so that only its owner can read it."""
    path = Path(str(url.database))
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        if not path.is_dir():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _postgresql(url: URL, busy_timeout_s: float) -> Engine:
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise missing_extra("psycopg", "postgres", "to keep state in PostgreSQL") from error
    waits = f"-c lock_timeout={int(busy_timeout_s * 1000)}"
    return create_engine(
        url, pool_pre_ping=True, connect_args={"options": waits, "connect_timeout": 10}
    )


def _prepare(connection: sqlite3.Connection, record: object) -> None:
    # Left alone, the driver opens transactions by itself, and a writer that began as a reader can
    # be refused in the middle.
    connection.isolation_level = None
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _check(session: Session, name: str) -> None:
    if session.get_bind().dialect.name != "sqlite":
        return
    found = session.execute(text("PRAGMA quick_check(1)")).scalar_one()
    if found != "ok":
        raise _damaged(name, found)


def _damaged(name: str, got: str) -> FormatError:
    step = "Restore a copy, or move it away to begin with an empty one"
    return FormatError(describe("content", name, "an undamaged database", got, step))


def _translated(error: DBAPIError, name: str) -> DeepseekError:
    cause = error.orig
    got = str(cause).strip()
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    state = getattr(cause, "sqlstate", None) or ""
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return _damaged(name, got)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) or state == "53100":
        return CapacityError(
            describe("disk", name, "large enough and sound", got, "Free some space")
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return ConfigError(describe("file", name, "one that can be read and written", got))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or state == "55P03":
        step = "Stop the other process that writes to it"
        return BackendError(describe("lock", name, "free", got, step))
    return BackendError(describe("database", name, "one that answers", got))
