"""The attacks of servers before us that no other test bears in its name; the numbers are those of
`docs/guide/serve.md`."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deepseek.serve import LocalServer, local_server
from deepseek.serve.generation import Grammar
from deepseek.serve.runtime.grammar import Grammars
from tests.generate.conftest import byte_tokenizer
from tests.house import SOURCE
from tests.ops.native import NEEDS_KERNELS
from tests.serve.api.support import HELLO, make_app, post
from tests.serve.bundles import tiny_bundle
from tests.serve.fakes import FakeGenerator
from tests.serve.test_service import collect, request, running, tokens_of

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def test_attack_1_nothing_of_the_server_reads_pickles() -> None:
    for path in (SOURCE / "serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not PICKLES & {name.split(".")[0] for name in names}, path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("attacks")
    bundle = tiny_bundle(folder)
    (bundle / "bundle.json").unlink()  # its hashes would tell that a file was changed
    config = json.loads((bundle / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (bundle / "config.json").write_text(json.dumps(config))
    mark = folder / "ran"
    (bundle / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    with local_server(bundle, ["--pages", "40", "--name", "tiny"]) as started:
        yield started
    assert not mark.exists()


def listeners(pid: int) -> list[str]:
    """Return the addresses that a process listens on, in the kernel's hexadecimal."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.append(words[1].split(":")[0])
    return found


@NEEDS_KERNELS
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="no /proc/net here")
def test_attack_2_and_5_one_loopback_port_and_no_code_of_the_model(server: LocalServer) -> None:
    assert httpx.get(f"{server.url}/models").status_code == 200
    assert listeners(server.pid) == ["0100007F"]


def test_attack_7_a_text_of_megabytes_without_a_space_is_refused_at_once() -> None:
    app = make_app(FakeGenerator())
    start_s = time.process_time()
    for text in ("a" * 3_900_000, "\u0301" * 1_000_000, "🙂" * 900_000):
        answer = post(app, "/v1/completions", {"model": "tiny", "prompt": text})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert post(app, "/v1/completions", {"prompt": "a" * 5_000_000}).status_code == 413
    assert time.process_time() - start_s < 20


def test_attack_12_grammars_without_end_leave_nothing_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "DEEPSEEK_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    grammars = Grammars(byte_tokenizer(eos_token="<end>"), 258)
    for number in range(200):
        text = json.dumps({"type": "object", "properties": {f"field{number}": {"type": "number"}}})
        grammars.matcher(Grammar(kind="json_schema", text=text))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "http://localhost:1/"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ],
)
def test_attack_15_and_16_media_are_refused_and_nothing_is_fetched(
    part: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an address was looked up")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
    answer = post(make_app(FakeGenerator()), "/v1/chat/completions", body)
    assert answer.status_code == 400 and "169.254" not in answer.text


@pytest.mark.parametrize("field", ["prompt_embeds", "inputs_embeds"])
def test_attack_17_tensors_in_requests_are_not_read(field: str) -> None:
    generator = FakeGenerator()
    body = {"model": "tiny", "prompt": "x", field: "gASVAAAAAAAAAA=="}
    answer = post(make_app(generator), "/v1/completions", body)
    assert answer.status_code in (200, 400)
    assert all(asked.prompt == generator.requests[0].prompt for asked in generator.requests)


@NEEDS_KERNELS
def test_attack_22_a_tenant_does_not_find_what_another_has_computed() -> None:
    async def body() -> None:
        async with running() as server:
            text = "a secret that somebody asked about, long enough for more than a page " * 2
            ann, bob = (request(text, tenant=name, max_tokens=4) for name in ("ann", "bob"))
            first = await collect(server.service, ann)
            other = await collect(server.service, bob)
            again = await collect(server.service, ann)
            assert first[-1].num_cached_tokens == other[-1].num_cached_tokens == 0
            assert again[-1].num_cached_tokens > 0
            assert tokens_of(first) == tokens_of(other) == tokens_of(again)

    asyncio.run(asyncio.wait_for(body(), 60))


def test_attack_25_an_answer_without_end_has_one() -> None:
    generator = FakeGenerator("no end " * 5000, context=100_000)
    app = make_app(generator, default_max_tokens=300)
    answer = post(app, "/v1/chat/completions", {"messages": HELLO, "ignore_eos": True})
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == 300


def test_attack_32_tools_are_given_back_and_never_run() -> None:
    """The server has nothing that could run one: no process is started from its routes."""
    for path in (SOURCE / "serve" / "api").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "subprocess" not in text and "os.system" not in text, path
