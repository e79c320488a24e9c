"""Batches go through OpenAI's states, and each line has one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek.errors import CapacityError, ConfigError
from deepseek.serve.state.batch_work import BatchWork, Task
from deepseek.serve.state.batches import BatchLimits, BatchStore, check_metadata
from deepseek.serve.state.database import Database
from deepseek.serve.state.errors import NotFoundError, QuotaError
from deepseek.serve.state.files import DAY_S, FileLimits, FileStore
from deepseek.serve.state.tables import LineRow
from tests.serve.state.batches import CHAT, put_batch, results
from tests.serve.state.clock import Clock


@pytest.fixture
def store(database: Database, tmp_path: Path, clock: Clock) -> BatchStore:
    return BatchStore(
        FileStore(database, tmp_path / "files", clock=clock), BatchLimits(lines=100, unfinished=3)
    )


@pytest.fixture
def work(store: BatchStore) -> BatchWork:
    return BatchWork(store)


def next_task(work: BatchWork, batch_id: str) -> Task:
    task = work.next_task(batch_id)
    assert task is not None
    return task


def test_a_batch_from_beginning_to_end(store: BatchStore, work: BatchWork, clock: Clock) -> None:
    batch_id = put_batch(store, "a", "one", "two", metadata={"project": "x"})
    made = store.get("a", batch_id)
    assert made["status"] == "validating" and made["metadata"] == {"project": "x"}
    assert made["created_at"] == 1_800_000_000 and made["expires_at"] == 1_800_000_000 + DAY_S
    clock.now += 1
    work.validate(batch_id)
    assert store.get("a", batch_id)["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    first = next_task(work, batch_id)
    assert (first.line, first.custom_id, first.url) == (1, "one", CHAT)
    assert first.body["messages"][0]["content"] == "one"
    second = work.next_task(batch_id, [1])
    assert second is not None and second.custom_id == "two"
    assert work.record(second, 400, {"error": {"message": "bad"}})
    assert store.get("a", batch_id)["status"] == "in_progress"
    clock.now += 1
    assert work.record(first, 200, {"answer": "1\u2028\ud800"})
    assert store.get("a", batch_id)["status"] == "finalizing"
    assert work.next_task(batch_id) is None
    clock.now += 1
    assert work.settle(batch_id)
    done = store.get("a", batch_id)
    assert done["status"] == "completed"
    times = [done[name] for name in ("in_progress_at", "finalizing_at", "completed_at")]
    assert times == [1_800_000_001, 1_800_000_002, 1_800_000_003]
    assert done["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    good, bad = results(store, "a", batch_id, "output"), results(store, "a", batch_id, "error")
    assert list(good) == ["one"] and list(bad) == ["two"]
    assert good["one"]["response"]["status_code"] == 200 and good["one"]["error"] is None
    assert good["one"]["response"]["body"] == {"answer": "1\u2028\ud800"}
    assert bad["two"]["response"]["body"] == {"error": {"message": "bad"}}
    file = store.files.get("a", done["output_file_id"])
    assert file.purpose == "batch_output" and file.filename == f"{batch_id}_output.jsonl"
    assert work.active() == []
    with store.database.read() as session:
        assert session.query(LineRow).count() == 0
        held = sum(one.size_bytes for one in store.files.list("a")[0])
        assert store.files.total_bytes(session) == held, "nothing is counted twice"


def test_a_line_has_one_result(store: BatchStore, work: BatchWork) -> None:
    batch_id = put_batch(store, "a", "one", "two")
    work.validate(batch_id)
    task = next_task(work, batch_id)
    assert work.record(task, 200, {"n": 1})
    assert not work.record(task, 200, {"n": 2})
    assert not work.record_error(task, "server_error", "late")
    assert store.get("a", batch_id)["request_counts"] == {"total": 2, "completed": 1, "failed": 0}


def test_files_are_written_once(store: BatchStore, work: BatchWork) -> None:
    batch_id = put_batch(store, "a", "one")
    work.validate(batch_id)
    work.record(next_task(work, batch_id), 200, {})
    work.settle(batch_id)
    before = store.get("a", batch_id), store.files.list("a")
    work.finish(batch_id, "completed", ("x", "y"))
    assert (store.get("a", batch_id), store.files.list("a")) == before
    folder = store.files.contents.path("")
    assert len(list(folder.iterdir())) == 2


def test_a_kill_between_file_and_status_leaves_the_batch_to_be_finished(
    store: BatchStore, work: BatchWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = put_batch(store, "a", "one")
    work.validate(batch_id)
    work.record(next_task(work, batch_id), 200, {})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.files, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            work.settle(batch_id)
    assert store.get("a", batch_id)["status"] == "finalizing"
    assert len(store.files.list("a")[0]) == 1
    assert len(list(store.files.contents.path("").iterdir())) == 1
    work.settle(batch_id)
    assert list(results(store, "a", batch_id, "output")) == ["one"]


def test_a_bad_input_fails_the_batch(store: BatchStore, work: BatchWork) -> None:
    content = b'{"custom_id": "a"}\nnonsense\n'
    file = store.files.create("a", "input", "batch", [content])
    batch_id = store.create("a", input_file_id=file.id, endpoint=CHAT)["id"]
    work.validate(batch_id)
    failed = store.get("a", batch_id)
    assert failed["status"] == "failed" and failed["failed_at"] == 1_800_000_000
    assert failed["errors"]["object"] == "list"
    assert [(one["code"], one["line"], one["param"]) for one in failed["errors"]["data"]] == [
        ("missing_required_parameter", 1, "method"),
        ("invalid_json_line", 2, None),
    ]
    assert failed["output_file_id"] is None and work.active() == []


def test_a_deleted_input_fails_the_batch(store: BatchStore, work: BatchWork) -> None:
    early, late = put_batch(store, "a", "one"), put_batch(store, "a", "one", "two")
    work.validate(late)
    work.record(next_task(work, late), 200, {})
    for batch_id in (early, late):
        store.files.delete("a", store.get("a", batch_id)["input_file_id"])
    work.validate(early)
    assert store.get("a", early)["errors"]["data"][0]["code"] == "invalid_file"
    with pytest.raises(NotFoundError):
        work.next_task(late)
    work.fail(late, "invalid_file", "gone")
    failed = store.get("a", late)
    assert failed["status"] == "failed" and failed["errors"]["data"][0]["message"] == "gone"
    assert list(results(store, "a", late, "output")) == ["one"]
    assert results(store, "a", late, "error")["two"]["error"]["code"] == "invalid_file"


@pytest.mark.parametrize("start", ["validating", "in_progress"])
def test_a_batch_is_cancelled(store: BatchStore, work: BatchWork, start: str) -> None:
    batch_id = put_batch(store, "a", "one", "two")
    if start == "in_progress":
        work.validate(batch_id)
        running = work.next_task(batch_id, [1])
        assert running is not None
        work.record(next_task(work, batch_id), 200, {})
    assert store.cancel("a", batch_id)["status"] == "cancelling"
    assert store.cancel("a", batch_id)["status"] == "cancelling"
    work.validate(batch_id)
    assert work.next_task(batch_id) is None
    if start == "in_progress":
        assert not work.record(running, 200, {}), "too late"
    assert work.settle(batch_id)
    done = store.get("a", batch_id)
    assert done["status"] == "cancelled" and done["cancelled_at"] and done["cancelling_at"]
    if start == "in_progress":
        assert list(results(store, "a", batch_id, "output")) == ["one"]
        assert results(store, "a", batch_id, "error")["two"]["error"]["code"] == "batch_cancelled"
    assert store.cancel("a", batch_id)["status"] == "cancelled"


def test_a_finished_batch_cannot_be_cancelled(store: BatchStore, work: BatchWork) -> None:
    batch_id = put_batch(store, "a", "one")
    work.validate(batch_id)
    work.record(next_task(work, batch_id), 200, {})
    with pytest.raises(ConfigError, match="finalizing"):
        store.cancel("a", batch_id)


def test_a_batch_expires_after_its_window(store: BatchStore, work: BatchWork, clock: Clock) -> None:
    batch_id = put_batch(store, "a", "one", "two")
    work.validate(batch_id)
    work.record(next_task(work, batch_id), 200, {})
    clock.now += DAY_S - 1
    assert not work.settle(batch_id) and not work.has_expired(work.active()[0])
    clock.now += 1
    assert work.has_expired(work.active()[0]) and work.settle(batch_id)
    assert store.get("a", batch_id)["status"] == "expired"
    assert list(results(store, "a", batch_id, "output")) == ["one"]
    assert results(store, "a", batch_id, "error")["two"]["error"]["code"] == "batch_expired"


def test_the_input_of_an_unfinished_batch_outlives_its_time(
    store: BatchStore, work: BatchWork, clock: Clock
) -> None:
    content = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}'
    file = store.files.create("a", "input", "batch", [content], ttl_s=3600)
    batch_id = store.create("a", input_file_id=file.id, endpoint=CHAT)["id"]
    clock.now += 7200
    assert store.files.sweep() == 0
    work.validate(batch_id)
    work.record(next_task(work, batch_id), 200, {})
    work.settle(batch_id)
    assert store.files.sweep() == 1
    assert list(results(store, "a", batch_id, "output")) == ["a"]


def test_another_tenants_batch_is_not_there(store: BatchStore) -> None:
    batch_id = put_batch(store, "a", "one")
    file_id = store.get("a", batch_id)["input_file_id"]
    for name in (batch_id, "", "../x", "batch_\0", "b" * 10_000):
        with pytest.raises(NotFoundError):
            store.get("b", name)
        with pytest.raises(NotFoundError):
            store.cancel("b", name)
        with pytest.raises(NotFoundError):
            store.list("b", after=name)
    assert store.list("b") == ([], False)
    with pytest.raises(NotFoundError):
        store.create("b", input_file_id=file_id, endpoint=CHAT)


def test_lists_come_in_pages(store: BatchStore) -> None:
    made = [put_batch(store, "a", f"{number}") for number in range(3)]
    page, more = store.list("a", limit=2)
    assert [batch["id"] for batch in page] == made[:0:-1] and more
    page, more = store.list("a", limit=2, after=made[1])
    assert [batch["id"] for batch in page] == made[:1] and not more


def test_unfinished_batches_are_bounded(store: BatchStore) -> None:
    for number in range(3):
        put_batch(store, "a", f"{number}")
    with pytest.raises(QuotaError, match="unfinished batches must be at most 3"):
        put_batch(store, "a", "x")
    put_batch(store, "b", "x")


REFUSED: list[dict[str, Any]] = [
    {"endpoint": "/v1/files"},
    {"completion_window": "1h"},
    {"metadata": {f"{number}": "" for number in range(17)}},
    {"metadata": {"k" * 65: ""}},
    {"metadata": {"k": "v" * 513}},
    {"metadata": {"": "v"}},
    {"output_ttl_s": 60},
]


@pytest.mark.parametrize("change", REFUSED)
def test_settings_are_bounded(store: BatchStore, change: dict[str, Any]) -> None:
    file = store.files.create("a", "input", "batch", [b""])
    with pytest.raises(ConfigError):
        store.create("a", **{"input_file_id": file.id, "endpoint": CHAT, **change})
    assert check_metadata({"k" * 64: "v" * 512}) and check_metadata(None) is None


def test_other_purposes_are_refused(store: BatchStore) -> None:
    file = store.files.create("a", "input", "user_data", [b""])
    with pytest.raises(ConfigError, match="purpose 'batch'"):
        store.create("a", input_file_id=file.id, endpoint=CHAT)


def test_results_keep_the_cap_of_the_disk(database: Database, tmp_path: Path, clock: Clock) -> None:
    limits = FileLimits(total_bytes=2000)
    store = BatchStore(FileStore(database, tmp_path / "capped", limits, clock=clock))
    work = BatchWork(store)
    batch_id = put_batch(store, "a", *"12345")
    work.validate(batch_id)
    for _ in range(5):
        assert work.record(next_task(work, batch_id), 200, {"text": "x" * 300})
    work.settle(batch_id)
    bad = results(store, "a", batch_id, "error")
    assert {line["error"]["code"] for line in bad.values()} == {"storage_full"}
    assert 1 <= len(results(store, "a", batch_id, "output")) == 5 - len(bad) < 5


def test_a_huge_answer_is_not_kept(store: BatchStore, work: BatchWork) -> None:
    batch_id = put_batch(store, "a", "one")
    work.validate(batch_id)
    assert work.record(next_task(work, batch_id), 200, {"text": "x" * 2**23})
    work.settle(batch_id)
    assert results(store, "a", batch_id, "error")["one"]["error"]["code"] == "answer_too_large"


def test_a_full_disk_leaves_the_line_to_be_run_again(
    store: BatchStore, work: BatchWork, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = put_batch(store, "a", "one")
    work.validate(batch_id)
    task = next_task(work, batch_id)
    with monkeypatch.context() as patch:
        patch.setattr(database, "write", _full)
        with pytest.raises(CapacityError):
            work.record(task, 200, {})
    assert work.next_task(batch_id) == task


def _full() -> None:
    raise CapacityError("full")


def test_finished_batches_are_forgotten_in_time(
    store: BatchStore, work: BatchWork, clock: Clock
) -> None:
    batch_id = put_batch(store, "a", "one")
    work.validate(batch_id)
    work.record(next_task(work, batch_id), 200, {})
    work.settle(batch_id)
    clock.now += 30 * DAY_S - 1
    work.sweep()
    assert store.get("a", batch_id)
    clock.now += 1
    work.sweep()
    with pytest.raises(NotFoundError):
        store.get("a", batch_id)
    assert list(store.files.contents.path("").iterdir()) == []
