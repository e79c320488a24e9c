"""The stores on PostgreSQL: Debian's server where it is installed, or the one that
`DEEPSEEK_TEST_POSTGRES` names."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, text

from deepseek.errors import BackendError
from deepseek.serve.state.batch_work import BatchWork
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.errors import NotFoundError, QuotaError
from deepseek.serve.state.files import FileLimits, FileStore
from deepseek.serve.state.keys import KeyStore
from deepseek.serve.state.responses import ResponseLimits, ResponseStore
from deepseek.serve.state.tables import Base
from deepseek.serve.state.usage import Usage, UsageLedger
from tests.conftest import TEST_POSTGRES
from tests.serve.state.batches import put_batch, results

pytest.importorskip("psycopg")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The URL of a database server."""
    if url := os.environ.get(TEST_POSTGRES):
        yield url
        return
    programs = [shutil.which(name) for name in ("initdb", "postgres")]
    if None in programs:
        pytest.skip(f"neither PostgreSQL's server is on PATH nor {TEST_POSTGRES} is set")
    with (
        tempfile.TemporaryDirectory(prefix="deepseek-pg-") as name,
        _server(*programs, name) as url,
    ):
        yield url


@contextlib.contextmanager
def _server(initdb: str, postgres: str, folder: str) -> Iterator[str]:
    """Run a server of our own that only listens on a socket in its folder."""
    # The server refuses to be the administrator.
    who = "nobody" if os.geteuid() == 0 else None
    name = who or pwd.getpwuid(os.geteuid()).pw_name
    if who:
        os.chown(folder, pwd.getpwnam(who).pw_uid, -1)
    data = f"{folder}/data"
    made = [initdb, "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(made, user=who, cwd="/", check=True, capture_output=True)
    settings = [part for one in ("listen_addresses=", "fsync=off") for part in ("-c", one)]
    with open(f"{folder}/log", "wb") as log:
        process = subprocess.Popen(
            [postgres, "-D", data, "-k", folder, *settings],
            user=who,
            cwd="/",
            stdout=log,
            stderr=log,
        )
        try:
            url = f"postgresql://tester@/postgres?host={folder}"
            _wait_for(url, process, name)
            yield url
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(url: str, process: subprocess.Popen[bytes], name: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    for _ in range(200):
        assert process.poll() is None, f"the server of {name} ended"
        with contextlib.suppress(Exception), engine.connect():
            break
        threading.Event().wait(0.05)
    engine.dispose()


@pytest.fixture
def database(address: str) -> Iterator[Database]:
    """A database without any tables of before."""
    engine = create_engine(make_url(address).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
    engine.dispose()
    opened = open_database(address)
    yield opened
    opened.close()


def test_migrations_and_models_agree(database: Database, address: str) -> None:
    open_database(address).close()
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_keys_and_usage(database: Database) -> None:
    keys = KeyStore(database)
    secret, key = keys.create("ci", tenant="team")
    assert keys.find(secret) == key and keys.find(secret + "x") is None
    keys.revoke(key.id)
    assert keys.find(secret) is None
    ledger = UsageLedger(database, flush_s=3600)
    for _ in range(2):
        ledger.add(key.id, "m", Usage(requests=1, prompt_tokens=2**40))
        ledger.flush()
    ledger.close()
    assert ledger.report(tenant="team")[0].usage == Usage(requests=2, prompt_tokens=2**41)


def test_files_and_batches(database: Database, tmp_path: Path) -> None:
    store = BatchStore(FileStore(database, tmp_path / "files"))
    work = BatchWork(store)
    batch_id = put_batch(store, "a", "one", "two", metadata={"k": "\0\ud800"})
    work.validate(batch_id)
    first, second = work.next_task(batch_id), work.next_task(batch_id, [1])
    assert first is not None and second is not None and second.custom_id == "two"
    assert work.record(first, 200, {"text": "\0\ud800"}) and not work.record(first, 200, {})
    assert work.record(second, 400, {})
    assert work.settle(batch_id)
    done = store.get("a", batch_id)
    assert done["status"] == "completed" and done["metadata"] == {"k": "\0\ud800"}
    assert results(store, "a", batch_id, "output")["one"]["response"]["body"]["text"] == "\0\ud800"
    assert list(results(store, "a", batch_id, "error")) == ["two"]
    assert [batch["id"] for batch in store.list("a")[0]] == [batch_id]
    assert len(store.files.list("a")[0]) == 3
    work.sweep()
    for wrong in ("file-\0", "\ud800"):
        with pytest.raises(NotFoundError):
            store.files.get("a", wrong)
        with pytest.raises(NotFoundError):
            store.get("a", wrong)


def test_responses(database: Database) -> None:
    store = ResponseStore(database, ResponseLimits(tenant_count=2))
    names = [f"resp_{number:032x}" for number in range(3)]
    for number, name in enumerate(names):
        previous = names[0] if number == 2 else None
        store.put("a", {"id": name, "output": [], "previous_response_id": previous}, [{"id": name}])
    assert [item["id"] for item in store.history("a", names[2])] == [names[0], names[2]]
    with pytest.raises(NotFoundError):
        store.get("a", names[1])


OTHER = """
import contextlib, sys
from pathlib import Path
from deepseek.serve.state.database import open_database
from deepseek.serve.state.errors import QuotaError
from deepseek.serve.state.files import FileLimits, FileStore

limits = FileLimits(tenant_files=5)
store = FileStore(open_database(sys.argv[1]), Path(sys.argv[2]), limits)
for _ in range(5):
    with contextlib.suppress(QuotaError):
        store.create("a", "n", "batch", [b"x"])
"""


def test_quotas_hold_between_processes(database: Database, address: str, tmp_path: Path) -> None:
    limits = FileLimits(tenant_files=5)
    mine = FileStore(database, tmp_path / "files", limits)
    other = subprocess.Popen([sys.executable, "-c", OTHER, address, str(tmp_path / "files")])
    for _ in range(5):
        with contextlib.suppress(QuotaError):
            mine.create("a", "n", "batch", [b"x"])
    assert other.wait(30) == 0
    assert len(mine.list("a")[0]) == 5 == len(list((tmp_path / "files").iterdir()))


def test_a_writer_does_not_wait_for_ever(database: Database, address: str) -> None:
    with database.write(), pytest.raises(BackendError, match=r"lock of .* must be free"):
        open_database(address, busy_timeout_s=0.1)
