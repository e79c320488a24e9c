"""Usage adds up exactly, and a killed process loses no more than it says."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deepseek.errors import CapacityError
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.keys import KeyStore
from deepseek.serve.state.usage import Usage, UsageLedger, UsageLine
from tests.serve.state.clock import Clock

NEVER = 3600.0
DAY = datetime.date(2027, 1, 15)


def test_usage_adds_up_by_key_model_and_day(database: Database, clock: Clock) -> None:
    ledger = UsageLedger(database, flush_s=NEVER, clock=clock)
    one = Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=3, requests=1)
    for _ in range(3):
        ledger.add("a", "small", one)
    ledger.flush()
    ledger.add("a", "small", Usage(requests=1, errors=1))
    ledger.add("a", "large", one)
    ledger.add("b", "small", one)
    clock.now += 86_400
    ledger.add("a", "small", one)
    ledger.close()
    total = Usage(prompt_tokens=21, cached_tokens=12, completion_tokens=9, requests=4, errors=1)
    next_day = DAY + datetime.timedelta(days=1)
    assert ledger.report() == [
        UsageLine(key_id="a", model="large", day=DAY, usage=one),
        UsageLine(key_id="a", model="small", day=DAY, usage=total),
        UsageLine(key_id="b", model="small", day=DAY, usage=one),
        UsageLine(key_id="a", model="small", day=next_day, usage=one),
    ]
    assert [line.day for line in ledger.report(since=next_day)] == [next_day]
    assert len(ledger.report(until=DAY)) == 3
    assert [line.key_id for line in ledger.report(key_id="b")] == ["b"]


def test_usage_of_a_tenant(database: Database) -> None:
    keys = KeyStore(database)
    mine = [keys.create(name, tenant="team")[1].id for name in ("x", "y")]
    other = keys.create("z")[1].id
    ledger = UsageLedger(database, flush_s=NEVER)
    for key in (*mine, other):
        ledger.add(key, "m", Usage(requests=1))
    ledger.close()
    assert {line.key_id for line in ledger.report(tenant="team")} == set(mine)


def test_the_thread_writes_by_itself(database: Database) -> None:
    ledger = UsageLedger(database, flush_s=0.01)
    ledger.add("a", "m", Usage(requests=1))
    written = threading.Event()

    def look() -> None:
        while not ledger.report():
            pass
        written.set()

    threading.Thread(target=look, daemon=True).start()
    assert written.wait(5)
    ledger.close()


def test_nothing_is_lost_or_counted_twice_when_writing_fails(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = UsageLedger(database, flush_s=NEVER)
    ledger.add("a", "m", Usage(requests=1))
    real = database.write
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(database, "write", _full_disk)
        with pytest.raises(CapacityError):
            ledger.flush()
        ledger.add("a", "m", Usage(requests=1))
        with pytest.raises(CapacityError):
            ledger.flush()
    assert database.write == real
    ledger.close()
    assert ledger.report()[0].usage == Usage(requests=2)


def _full_disk() -> None:
    raise CapacityError("full")


def test_many_threads_add_to_one_sum(database: Database) -> None:
    ledger = UsageLedger(database, flush_s=0.001)

    def add() -> None:
        for _ in range(500):
            ledger.add("a", "m", Usage(requests=1, prompt_tokens=2))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    assert ledger.report()[0].usage == Usage(requests=2000, prompt_tokens=4000)


WORKER = """
import sys
from pathlib import Path
from deepseek.serve.state.database import open_database
from deepseek.serve.state.usage import Usage, UsageLedger

ledger = UsageLedger(open_database(Path(sys.argv[1])), flush_s=3600)
for number in range(1, 10**9):
    ledger.add("a", "m", Usage(requests=1))
    if number % 10 == 0:
        ledger.flush()
        print(number, flush=True)
"""


def test_kill_loses_only_what_was_not_flushed(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for _ in range(5):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    told = [int(line) for line in process.stdout.read().split() if line.isdigit()]
    process.stdout.close()
    process.wait()
    flushed = max([50, *told])
    database = open_database(path)
    ledger = UsageLedger(database, flush_s=NEVER)
    # One more flush may have been on disk before it was told of.
    assert ledger.report()[0].usage.requests in (flushed, flushed + 10)
    ledger.close()
    database.close()
