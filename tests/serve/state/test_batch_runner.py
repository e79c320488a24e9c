"""The worker is fair, patient, stops when told, and does each line once whatever is killed."""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepseek.errors import CapacityError
from deepseek.serve.state.batch_runner import BatchRunner, RunLine, RunnerConfig
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.files import DAY_S, FileStore
from tests.serve.state.batches import put_batch, results
from tests.serve.state.clock import Clock

FAST = RunnerConfig(concurrency=2, poll_s=0.005, first_wait_s=0.01, longest_wait_s=0.02, grace_s=5)


@pytest.fixture
def store(database: Database, tmp_path: Path, clock: Clock) -> BatchStore:
    return BatchStore(FileStore(database, tmp_path / "files", clock=clock))


def work_until(
    store: BatchStore,
    run_line: RunLine,
    is_done: Callable[[], bool],
    config: RunnerConfig = FAST,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run a worker until something is so; fails after half a minute."""

    async def main() -> None:
        runner = BatchRunner(store, run_line, config, clock=clock)
        working = asyncio.create_task(runner.run())
        async with asyncio.timeout(30):
            while not is_done() and not working.done():
                await asyncio.sleep(0.002)
            runner.stop()
            await working

    asyncio.run(main())


def content(body: Mapping[str, Any]) -> str:
    return body["messages"][0]["content"]


async def echo(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    return 200, {"tenant": tenant, "url": url, "text": content(body)}


def has_status(store: BatchStore, tenant: str, batch_id: str, status: str) -> Callable[[], bool]:
    return lambda: store.get(tenant, batch_id)["status"] == status


def test_batches_of_all_tenants_are_completed(store: BatchStore) -> None:
    ids = {tenant: put_batch(store, tenant, "one", "two", "three") for tenant in "abc"}
    work_until(
        store,
        echo,
        lambda: all(store.get(name, one)["status"] == "completed" for name, one in ids.items()),
    )
    for tenant, batch_id in ids.items():
        found = results(store, tenant, batch_id, "output")
        assert {name: line["response"]["body"]["tenant"] for name, line in found.items()} == {
            "one": tenant,
            "two": tenant,
            "three": tenant,
        }


def test_few_lines_run_at_once_and_tenants_take_turns(store: BatchStore) -> None:
    large = put_batch(store, "large", *(f"{number}" for number in range(20)))
    small = put_batch(store, "small", "0", "1", "2")
    order: list[str] = []
    most = running = 0

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(tenant)
        await asyncio.sleep(0.005)
        running -= 1
        return 200, {}

    work_until(store, run_line, has_status(store, "large", large, "completed"))
    assert store.get("small", small)["status"] == "completed"
    assert most == 2
    assert order[:8].count("small") == 3, order


def test_turns_are_even_whatever_was_run_before(store: BatchStore) -> None:
    put_batch(store, "old", *"01234")
    order: list[str] = []
    late: list[tuple[str, str]] = []

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        order.append(tenant)
        if content(body) == "4":
            late.extend((name, put_batch(store, name, *"abc")) for name in ("old", "new"))
        return 200, {}

    def are_done() -> bool:
        return bool(late) and all(store.get(*one)["status"] == "completed" for one in late)

    work_until(store, run_line, are_done, RunnerConfig(concurrency=1, poll_s=0.005))
    assert order[5:] == ["new", "old", "new", "old", "new", "old"]


def test_a_busy_tenant_waits_alone(store: BatchStore) -> None:
    slow = put_batch(store, "slow", "0")
    order: list[str] = []
    waiting = Clock(0.0)

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        order.append(tenant)
        if len(order) == 1:
            put_batch(store, "quick", *"01234")
            return 429, {}
        waiting.now += 0.2
        return 200, {}

    config = RunnerConfig(concurrency=1, poll_s=0.002, first_wait_s=0.9)
    work_until(store, run_line, has_status(store, "slow", slow, "completed"), config, waiting)
    assert order == ["slow", *["quick"] * 5, "slow"]
    assert list(results(store, "slow", slow, "output")) == ["0"], "429 is no result"


def test_a_busy_server_is_left_alone(store: BatchStore) -> None:
    batch_id = put_batch(store, "a", *"0123")
    begun: list[float] = []

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        begun.append(time.monotonic())
        return (503, {}) if len(begun) <= 3 else (200, {})

    config = RunnerConfig(concurrency=1, poll_s=0.002, first_wait_s=0.02, longest_wait_s=0.05)
    work_until(store, run_line, has_status(store, "a", batch_id, "completed"), config)
    waits = [after - before for before, after in itertools.pairwise(begun)][:3]
    assert len(begun) == 7
    assert waits[0] >= 0.02 and waits[1] >= 0.04 and waits[2] >= 0.05


def test_errors_go_to_the_error_file(store: BatchStore, caplog: pytest.LogCaptureFixture) -> None:
    batch_id = put_batch(store, "a", "good", "bad", "broken")

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        if content(body) == "broken":
            raise RuntimeError("secret detail")
        return (400 if content(body) == "bad" else 200), {"said": content(body)}

    with caplog.at_level(logging.CRITICAL):
        work_until(store, run_line, has_status(store, "a", batch_id, "completed"))
    bad = results(store, "a", batch_id, "error")
    assert bad["bad"]["response"]["status_code"] == 400
    assert bad["broken"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(bad)
    assert list(results(store, "a", batch_id, "output")) == ["good"]


def test_cancelling_stops_lines_under_way(store: BatchStore) -> None:
    batch_id = put_batch(store, "a", "quick", "endless", "never")
    stopped: list[str] = []

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        if content(body) == "quick":
            return 200, {}
        try:
            store.cancel("a", batch_id)
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            stopped.append(content(body))
            raise
        return 200, {}

    config = RunnerConfig(concurrency=1, poll_s=0.005)
    work_until(store, run_line, has_status(store, "a", batch_id, "cancelled"), config)
    assert stopped == ["endless"]
    assert list(results(store, "a", batch_id, "output")) == ["quick"]
    assert set(results(store, "a", batch_id, "error")) == {"endless", "never"}


def test_an_expired_batch_ends_with_what_it_has(store: BatchStore, clock: Clock) -> None:
    batch_id = put_batch(store, "a", "quick", "endless")

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        if content(body) == "endless":
            clock.now += DAY_S
            await asyncio.sleep(3600)
        return 200, {}

    config = RunnerConfig(concurrency=1, poll_s=0.005)
    work_until(store, run_line, has_status(store, "a", batch_id, "expired"), config)
    assert results(store, "a", batch_id, "error")["endless"]["error"]["code"] == "batch_expired"


def test_a_deleted_input_ends_the_batch(store: BatchStore) -> None:
    batch_id = put_batch(store, "a", "one", "two")

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        store.files.delete("a", store.get("a", batch_id)["input_file_id"])
        return 200, {}

    config = RunnerConfig(concurrency=1, poll_s=0.005)
    work_until(store, run_line, has_status(store, "a", batch_id, "failed"), config)
    assert list(results(store, "a", batch_id, "output")) == ["one"]


def test_stopping_waits_for_lines_under_way_and_no_longer_than_told(store: BatchStore) -> None:
    batch_id = put_batch(store, "a", "quick", "endless", "never")
    begun: list[str] = []

    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        begun.append(content(body))
        await asyncio.sleep(0.05 if content(body) == "quick" else 3600)
        return 200, {}

    config = RunnerConfig(concurrency=2, poll_s=0.005, grace_s=0.2)
    work_until(store, run_line, lambda: len(begun) == 2, config)
    assert begun == ["quick", "endless"]
    assert store.get("a", batch_id)["request_counts"]["completed"] == 1
    work_until(store, echo, has_status(store, "a", batch_id, "completed"))
    assert set(results(store, "a", batch_id, "output")) == {"quick", "endless", "never"}


def test_trouble_with_the_database_is_waited_out(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch_id = put_batch(store, "a", "one", "two")
    real, troubles = store.database.write, iter(range(5))

    def sometimes() -> Any:
        if next(troubles, None) is not None:
            raise CapacityError("full")
        return real()

    monkeypatch.setattr(store.database, "write", sometimes)
    with caplog.at_level(logging.ERROR):
        work_until(store, echo, has_status(store, "a", batch_id, "completed"))
    assert next(troubles, None) is None
    assert len(results(store, "a", batch_id, "output")) == 2
    assert "full" in caplog.text


WORKER = """
import asyncio, sys
from pathlib import Path
from deepseek.serve.state.batch_runner import BatchRunner, RunnerConfig
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.database import open_database
from deepseek.serve.state.files import FileStore

folder = Path(sys.argv[1])
store = BatchStore(FileStore(open_database(folder / "state.db"), folder / "files"))
log = open(folder / "log", "a", buffering=1)

async def run_line(tenant, url, body):
    log.write(body["messages"][0]["content"] + "\\n")
    await asyncio.sleep(0.001)
    return 200, {}

runner = BatchRunner(store, run_line, RunnerConfig(concurrency=3, poll_s=0.002))
print("begun", flush=True)
asyncio.run(runner.run())
"""


def test_kill_and_restart_do_every_line_once(tmp_path: Path) -> None:
    lines, kills = 60, 3
    database = open_database(tmp_path / "state.db")
    store = BatchStore(FileStore(database, tmp_path / "files"))
    batch_id = put_batch(store, "a", *(f"{number}" for number in range(lines)))
    chance = random.Random(0)
    for kill in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout and process.stdout.readline() == "begun\n"
        until = lines if kill == kills else chance.randint(5, 15) + 15 * kill
        deadline = time.monotonic() + 60
        while store.get("a", batch_id)["request_counts"]["completed"] < until:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        while kill == kills and store.get("a", batch_id)["status"] != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    assert store.get("a", batch_id)["request_counts"] == {
        "total": lines,
        "completed": lines,
        "failed": 0,
    }
    assert set(results(store, "a", batch_id, "output")) == {f"{n}" for n in range(lines)}
    run = collections.Counter((tmp_path / "log").read_text().split())
    assert sum(run.values()) - lines <= kills * 3, "only lines under way run again"
    database.close()
