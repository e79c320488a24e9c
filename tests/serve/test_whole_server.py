"""The real server with all that stands beside the model, through the real client of OpenAI."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

import deepseek
from deepseek.face import load_encoder_engine
from deepseek.serve import LocalServer, local_server
from tests.generate.encoders import tiny_encoder
from tests.ops.native import NEEDS_KERNELS
from tests.serve.bundles import tiny_bundle

pytestmark = NEEDS_KERNELS

OPTIONS = ["--pages", "200", "--name", "tiny"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("models"))


def state_options(folder: Path) -> list[str]:
    return [*OPTIONS, "--state", str(folder / "state"), "--events", str(folder / "events.jsonl")]


@pytest.fixture
def server(bundle: Path, tmp_path: Path) -> Iterator[LocalServer]:
    with local_server(bundle, state_options(tmp_path)) as started:
        yield started


def client_of(server: LocalServer, key: str = "none") -> OpenAI:
    return OpenAI(base_url=server.url, api_key=key, max_retries=0)


def lines(count: int, max_tokens: int = 3) -> bytes:
    """Return the input file of a batch."""
    found = [
        {
            "custom_id": f"line {number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": f"text {number}", "max_tokens": max_tokens},
        }
        for number in range(count)
    ]
    return "\n".join(json.dumps(line) for line in found).encode()


def begin_batch(client: OpenAI, content: bytes) -> str:
    uploaded = client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    batch = client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
    )
    return batch.id


def finished_lines(client: OpenAI, batch_id: str, timeout_s: float = 60) -> list[str]:
    """Wait for a batch and return the custom ids of its answers."""
    deadline = time.monotonic() + timeout_s
    while (batch := client.batches.retrieve(batch_id)).status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    assert batch.output_file_id is not None
    answers = client.files.content(batch.output_file_id).text.splitlines()
    found = [json.loads(answer) for answer in answers]
    assert all(each["response"]["status_code"] == 200 for each in found)
    return [each["custom_id"] for each in found]


def ended_response(client: OpenAI, response_id: str, timeout_s: float = 60) -> str:
    """Wait for a response in the background and return its text."""
    deadline = time.monotonic() + timeout_s
    while (found := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    assert found.status in ("completed", "incomplete"), found
    return found.output_text


def test_responses_in_the_background(server: LocalServer) -> None:
    client = client_of(server)
    asked: Any = {"model": "tiny", "temperature": 0, "max_output_tokens": 20}
    waited = client.responses.create(input="Hello", **asked)
    made = client.responses.create(input="Hello", background=True, **asked)
    assert made.status == "queued"
    assert ended_response(client, made.id) == waited.output_text
    stream = client.responses.create(input="Hello", background=True, stream=True, **asked)
    response_id = next(stream).response.id  # type: ignore[union-attr]
    stream.close()
    *_, last = client.responses.retrieve(response_id, stream=True, starting_after=0)
    assert last.response.output_text == waited.output_text  # type: ignore[union-attr]


def test_batches_responses_and_events(server: LocalServer, tmp_path: Path) -> None:
    client = client_of(server)
    batch = begin_batch(client, lines(5))
    first = client.responses.create(model="tiny", input="Hello", max_output_tokens=4)
    second = client.responses.create(
        model="tiny", input="And now?", previous_response_id=first.id, max_output_tokens=4
    )
    assert client.responses.retrieve(second.id).previous_response_id == first.id
    kinds = [
        event.type
        for event in client.responses.create(
            model="tiny", input="Hi", max_output_tokens=3, stream=True
        )
    ]
    assert kinds[0] == "response.created" and kinds[-1] in (
        "response.completed",
        "response.incomplete",
    )
    assert sorted(finished_lines(client, batch)) == [f"line {number}" for number in range(5)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_" + "0" * 32)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(events) == 8 and all(event["mean_entropy"] > 0 for event in events)
    assert all(event["text"] is None and event["prompt"] is None for event in events)


def test_vectors_by_the_model_itself(server: LocalServer) -> None:
    client = client_of(server)
    found = client.embeddings.create(model="tiny", input=["a cat", "dogs", "a cat"])
    one, other, again = (np.array(each.embedding) for each in found.data)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert found.usage.prompt_tokens == 5 + 4 + 5
    body = {"model": "tiny", "query": "a cat", "documents": ["dogs", "a cat"], "top_n": 1}
    ranked = client.post("/rerank", body=body, cast_to=object)
    assert ranked["results"][0]["index"] == 1  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a cat")


def test_vectors_by_an_encoder_beside_it(bundle: Path, tmp_path: Path) -> None:
    deepseek.save(tiny_encoder(), tmp_path / "encoder")
    words = [*OPTIONS, "--embeddings", str(tmp_path / "encoder"), "--embeddings-scheme", "int8"]
    with local_server(bundle, words) as server:
        found = client_of(server).embeddings.create(model="encoder", input="a cat")
    wanted = load_encoder_engine(tmp_path / "encoder", scheme="int8").embed(["a cat"])
    np.testing.assert_allclose(found.data[0].embedding, wanted[0], atol=1e-6)


@pytest.mark.slow
def test_kill_minus_9_in_the_middle_of_load_loses_no_line_and_no_response(
    bundle: Path, tmp_path: Path
) -> None:
    options = state_options(tmp_path)
    with local_server(bundle, options) as server:
        client = client_of(server)
        kept = client.responses.create(model="tiny", input="Hello", max_output_tokens=4)
        batch = begin_batch(client, lines(30, max_tokens=20))
        asked: Any = {"model": "tiny", "temperature": 0, "max_output_tokens": 200}
        waited = [client.responses.create(input=str(number), **asked) for number in range(3)]
        later = [
            client.responses.create(input=str(number % 3), background=True, **asked).id
            for number in range(12)
        ]
        while client.batches.retrieve(batch).request_counts.completed < 3:  # type: ignore[union-attr]
            time.sleep(0.02)
        os.kill(server.pid, signal.SIGKILL)
    with local_server(bundle, options) as server:
        client = client_of(server)
        assert client.responses.retrieve(kept.id).output == kept.output
        for number, name in enumerate(later):
            assert ended_response(client, name) == waited[number % 3].output_text
        found = finished_lines(client, batch)
        assert sorted(found) == sorted(f"line {number}" for number in range(30))


def test_two_servers_do_not_share_a_state(
    server: LocalServer, bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "deepseek", "serve", str(bundle), "--port", "0"]
    command += state_options(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "that no other server has" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def keys_of(bundle: Path, folder: Path, *words: str) -> dict[str, str]:
    """Run `deepseek serve` with words about keys, and return what it says."""
    command = [sys.executable, "-m", "deepseek", "serve", str(bundle), "--json", *words]
    command += ["--state", str(folder / "state")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_keys_are_asked_for_limited_counted_and_revoked(bundle: Path, tmp_path: Path) -> None:
    user = keys_of(bundle, tmp_path, "--add-key", "ann", "--key-requests", "2")
    admin = keys_of(bundle, tmp_path, "--add-key", "root", "--key-admin")
    with local_server(bundle, state_options(tmp_path)) as server:
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "wrong").models.list()
        client = client_of(server, user["key"])
        for _ in range(2):
            client.completions.create(model="tiny", prompt="x", max_tokens=2)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="x", max_tokens=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        base = server.url.removesuffix("/v1")
        asked = {"Authorization": f"Bearer {user['key']}"}
        assert httpx.get(f"{base}/admin/usage", headers=asked).status_code in (403, 404)
        asked = {"Authorization": f"Bearer {admin['key']}"}
        report = httpx.get(f"{base}/admin/usage", headers=asked).json()["data"]
        assert [(line["requests"], line["model"]) for line in report] == [(2, "tiny")]
        keys_of(bundle, tmp_path, "--revoke-key", user["id"])
        deadline = time.monotonic() + 20
        while (
            httpx.get(
                f"{server.url}/models", headers={"Authorization": f"Bearer {user['key']}"}
            ).status_code
            != 401
        ):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    listed = keys_of(bundle, tmp_path, "--list-keys")["keys"]
    found = sorted((key["name"], key["revoked"]) for key in listed)  # made within one second
    assert found == [("ann", True), ("root", False)]  # type: ignore[index]
