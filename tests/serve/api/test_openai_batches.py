"""The real `openai` client uploads files and runs batches."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch, FileObject
from pydantic import TypeAdapter

from deepseek.serve.api.routes.batches import batches_router
from deepseek.serve.api.routes.files import files_router
from deepseek.serve.state.batch_runner import BatchRunner, RunnerConfig
from deepseek.serve.state.batches import BatchLimits, BatchStore
from deepseek.serve.state.database import open_database
from deepseek.serve.state.files import FileLimits, FileStore
from tests.serve.api.stub import app_of, current_tenant, served

MOST = 100_000
FORM = "multipart/form-data; boundary=b"
PART = b"--b\r\ncontent-disposition: form-data; %s\r\n\r\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchStore]:
    folder = tmp_path_factory.mktemp("state")
    database = open_database(folder / "state.db")
    files = FileStore(database, folder / "files", FileLimits(file_bytes=MOST, tenant_files=50))
    yield BatchStore(files, BatchLimits(unfinished=2))
    database.close()


@pytest.fixture(scope="module")
def address(store: BatchStore) -> Iterator[str]:
    routers = files_router(store.files, current_tenant), batches_router(store, current_tenant)
    with served(app_of(*routers)) as url:
        yield url


@pytest.fixture
def client(address: str, request: pytest.FixtureRequest) -> Iterator[OpenAI]:
    """A client that is a tenant of its own."""
    with OpenAI(
        base_url=f"{address}/v1", api_key=request.node.name[:100], max_retries=0, timeout=30
    ) as made:
        yield made


@pytest.fixture
def worker(store: BatchStore) -> Iterator[None]:
    async def run_line(tenant: str, url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        if body["model"] == "none":
            return 404, {"error": {"message": "no such model"}}
        return 200, {"echo": body, "tenant": tenant}

    runner = BatchRunner(store, run_line, RunnerConfig(poll_s=0.01))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(runner.run(),))
    thread.start()
    yield
    loop.call_soon_threadsafe(runner.stop)
    thread.join(10)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def lines(*models: str) -> bytes:
    made = [
        {
            "custom_id": f"request-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model},
        }
        for number, model in enumerate(models)
    ]
    return b"".join(json.dumps(one).encode() + b"\n" for one in made)


def strictly(value: Any, kind: Any) -> Any:
    """Check a value against every type that the client declares, which it does not do itself."""
    return TypeAdapter(kind).validate_python(value.model_dump(by_alias=True))


def ended(client: OpenAI, batch_id: str) -> Batch:
    deadline = time.monotonic() + 30
    while True:
        batch = strictly(client.batches.retrieve(batch_id), Batch)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        assert time.monotonic() < deadline, batch


def test_files_come_back_as_they_went(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "données.jsonl"
    path.write_bytes(bytes(range(256)) * 300)
    made = strictly(client.files.create(file=path, purpose="user_data"), FileObject)
    assert made.bytes == 256 * 300 and made.filename == "données.jsonl"
    assert client.files.content(made.id).read() == path.read_bytes()
    assert client.files.retrieve(made.id) == made
    raw = client.files.with_raw_response.content(made.id)
    assert raw.headers["content-type"] == "application/octet-stream"
    assert raw.headers["content-disposition"].startswith("attachment")
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="No such file"):
        client.files.retrieve(made.id)


def test_files_are_listed_page_by_page(client: OpenAI) -> None:
    made = [client.files.create(file=("a", b"x"), purpose="batch").id for _ in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert list(client.files.list(purpose="vision")) == []
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")


def test_a_time_to_live_is_kept(client: OpenAI) -> None:
    after: Any = {"anchor": "created_at", "seconds": 3600}
    made = client.files.create(file=("a", b"x"), purpose="batch", expires_after=after)
    assert made.expires_at == made.created_at + 3600
    for seconds in (1, 10**9):
        after = {"anchor": "created_at", "seconds": seconds}
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            client.files.create(file=("a", b"x"), purpose="batch", expires_after=after)


def test_too_large_a_file_is_refused(client: OpenAI, store: BatchStore) -> None:
    before = sorted(store.files.contents.path("").iterdir())
    for size in (MOST + 1, MOST * 5):
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("a", b"x" * size), purpose="batch")
        assert caught.value.status_code == 413
    assert sorted(store.files.contents.path("").iterdir()) == before
    client.files.create(file=("a", b"x" * MOST), purpose="batch")


def test_an_endless_upload_is_cut_off(address: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("authorization", "Bearer endless")
    connection.putheader("content-type", "multipart/form-data; boundary=b")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    connection.send(b"%x\r\n%s\r\n" % (len(head), head))
    for _ in range(2 * MOST // 0x4000):
        connection.send(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
    assert connection.getresponse().status == 413, "and the form had no end yet"
    connection.close()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/json"),
        (b"{}", "application/json"),
        (b"", "multipart/form-data"),
        (b"", FORM),
        (b"garbage", FORM),
        (b"--b--\r\n", FORM),
        (PART % b'name="purpose"' + b"batch\r\n--b--\r\n", FORM),
        (PART % b'name="file"; filename="f"' + b"x\r\n--b--\r\n", FORM),
        (PART % b'filename="f"' + b"x\r\n--b--\r\n", FORM),
        (b"x" * 5000, "multipart/form-data; boundary=" + "b" * 3000),
    ],
)
def test_bad_forms_are_told_in_openais_form(address: str, body: bytes, kind: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request(
        "POST", "/v1/files", body, {"authorization": "Bearer x", "content-type": kind}
    )
    answer = connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"
    connection.close()


@pytest.mark.parametrize(("key", "size", "status"), [("wrong", 50_000, 401), ("x", 10**12, 413)])
def test_uploads_are_refused_before_they_are_sent(
    address: str, key: str, size: int, status: int
) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("authorization", f"Bearer {key}")
    connection.putheader("content-type", FORM)
    connection.putheader("content-length", f"{size}")
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_a_batch_is_run(client: OpenAI, worker: None, request: pytest.FixtureRequest) -> None:
    file = client.files.create(file=("in.jsonl", lines("m", "none", "m")), purpose="batch")
    made = strictly(
        client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"job": "nightly"},
            output_expires_after={"anchor": "created_at", "seconds": 7200},
        ),
        Batch,
    )
    assert made.status == "validating" and made.metadata == {"job": "nightly"}
    done = ended(client, made.id)
    assert done.status == "completed" and done.request_counts
    assert done.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert done.output_file_id and done.error_file_id
    output = [json.loads(line) for line in client.files.content(done.output_file_id).iter_lines()]
    assert [line["custom_id"] for line in output] == ["request-0", "request-2"]
    assert output[0]["response"]["body"]["tenant"] == request.node.name
    errors = json.loads(client.files.content(done.error_file_id).read())
    assert errors["custom_id"] == "request-1" and errors["response"]["status_code"] == 404
    known = client.files.retrieve(done.output_file_id)
    assert known.purpose == "batch_output" and known.expires_at == known.created_at + 7200
    assert [batch.id for batch in client.batches.list(limit=1)] == [made.id]


def test_a_bad_batch_fails(client: OpenAI, worker: None) -> None:
    content = lines("m", "m").replace(b"request-1", b"request-0") + b"{\n"
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    failed = ended(client, made.id)
    assert failed.status == "failed" and failed.errors and failed.errors.data
    assert [(one.code, one.line) for one in failed.errors.data] == [
        ("duplicate_custom_id", 2),
        ("invalid_json_line", 3),
    ]


def test_batches_are_cancelled_and_bounded(client: OpenAI, address: str) -> None:
    file = client.files.create(file=("in.jsonl", lines("m")), purpose="batch")
    more: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made = [client.batches.create(input_file_id=file.id, **more) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="unfinished batches"):
        client.batches.create(input_file_id=file.id, **more)
    assert client.batches.cancel(made[0].id).status == "cancelling"
    assert [batch.id for batch in client.batches.list(limit=1)] == [made[1].id, made[0].id]
    with OpenAI(base_url=f"{address}/v1", api_key="mallory", max_retries=0) as other:
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(made[1].id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=file.id, **more)
        with pytest.raises(openai.NotFoundError):
            other.files.content(file.id)
    for change in ({"endpoint": "/v1/files"}, {"completion_window": "1h"}, {"metadata": {"k": 1}}):
        with pytest.raises(openai.BadRequestError):
            client.batches.create(**{"input_file_id": file.id, **more, **change})
