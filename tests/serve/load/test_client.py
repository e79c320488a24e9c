"""The client: true times under a clock that the server moves, every dialect, every failure."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from deepseek.errors import BackendError, ConfigError
from deepseek.serve.load import Client, Outcome, Target
from tests.serve.load.fake_server import (
    DONE,
    STREAM,
    Clock,
    FakeServer,
    Reply,
    Step,
    delta,
    event,
    http,
    piece,
    plain,
    usage,
)

HELLO = [{"role": "user", "content": "hello"}]


async def asked(
    server: FakeServer, *, max_tokens: int = 3, hang_up_after: int | None = None, **settings: Any
) -> Outcome:
    """Return what becomes of one request to a server."""
    clock = server.clock or asyncio.get_running_loop().time
    target = Target(**{"url": server.url, "model": "fake", **settings})
    outcome = Outcome(dialogue=0, planned_s=0.0, sent_s=0.0)
    async with Client(target, clock) as client:
        await client.ask(HELLO, max_tokens, outcome, hang_up_after)
    return outcome


def ask(reply: Reply | list[Step], **settings: Any) -> Outcome:
    """Return what becomes of one request that is answered so."""
    given = (lambda asked: reply) if isinstance(reply, list) else reply

    async def run() -> Outcome:
        async with FakeServer(given) as server:
            return await asked(server, **settings)

    return asyncio.run(run())


def test_times_are_those_of_the_server() -> None:
    steps = [0.5, STREAM, piece(" a"), 0.125, piece(" b"), 0.25, piece(" c", "length"), 1.0]

    async def run() -> Outcome:
        clock = Clock()
        clock.now = 100.0
        async with FakeServer(lambda asked: [*steps, usage(7, 3, 5), DONE], clock) as server:
            return await asked(server)

    found = asyncio.run(run())
    assert found.is_answered and found.text == " a b c" and found.finish_reason == "length"
    assert found.first_token_s == 0.5 and found.gaps_s == [0.125, 0.25]
    assert found.end_to_end_s == 1.875 and found.time_per_output_token_s == 0.1875
    assert (found.prompt_tokens, found.answer_tokens, found.cached_tokens) == (7, 3, 5)


def test_pieces_without_text_are_no_tokens() -> None:
    steps: list[Step] = [STREAM, delta(role="assistant", content=""), 0.5, delta(), b": ping\n\n"]
    steps += [0.5, delta(content="a"), 0.25, delta(content=None), delta("stop"), DONE]

    async def run() -> Outcome:
        clock = Clock()
        async with FakeServer(lambda asked: steps, clock) as server:
            return await asked(server, endpoint="chat")

    found = asyncio.run(run())
    assert found.is_answered and found.first_token_s == 1.0 and found.gaps_s == []
    assert found.tokens == 1 and found.time_per_output_token_s is None


def test_real_waits_are_seen() -> None:
    found = ask([0.03, STREAM, piece("a"), 0.06, piece("b", "stop"), DONE])
    assert 0.03 <= found.first_token_s < 1.0 and 0.05 <= found.gaps_s[0] < 1.0


DIALECTS: dict[str, list[Step]] = {
    "OpenAI chat": [
        delta(role="assistant", content="", refusal=None),
        delta(content="a"),
        delta(content="b"),
        delta("stop"),
        usage(4, 2),
        DONE,
    ],
    "counts in the last piece": [
        piece("a"),
        event(choices=[{"text": "b", "finish_reason": "stop"}], usage={"completion_tokens": 2}),
        DONE,
    ],
    "counts in every piece": [
        event(choices=[{"text": "a", "index": 0}], usage={"completion_tokens": 1}),
        event(choices=[{"text": "b", "index": 0}], usage={"completion_tokens": 2}),
        event(choices=[{"text": "", "finish_reason": "stop"}], usage={"completion_tokens": 2}),
        DONE,
    ],
    "counts that are null": [
        event(choices=[{"text": "a"}], usage=None),
        event(choices=[{"text": "b"}], usage={"completion_tokens": None}),
        piece("", "stop"),
        DONE,
    ],
    "no counts": [piece("a"), piece("b", "stop"), DONE],
    "no end mark": [piece("a"), piece("b"), piece("", "stop")],
    "no reason": [piece("a"), piece("b"), DONE],
    "thoughts": [delta(reasoning_content="a"), delta(content=None, reasoning="b"), DONE],
    "another choice between": [
        piece("a"),
        event(choices=[{"index": 1, "text": "x"}]),
        piece("b", "stop"),
        DONE,
    ],
    "returns and comments": [
        b": hello\r\n\r\n",
        piece("a").replace(b"\n", b"\r\n"),
        b"event: token\r\nid: 3\r\n" + piece("b", "stop").replace(b"\n", b"\r\n"),
        b"data:[DONE]\r\n\r\n",
    ],
    "all in one packet": [piece("a") + piece("b", "stop") + usage(1, 2) + DONE],
    "cut anywhere": [bytes([byte]) for byte in piece("a") + piece("b", "stop") + DONE],
    "more behind the end": [piece("a"), piece("b", "stop"), DONE, b"data: what\n\n"],
    "fields that nobody knows": [
        event(choices=[{"text": "a", "token_ids": [1]}], timings={"predicted_ms": 3}),
        event(choices=None),
        event(choices=[None, {"text": ["no"]}]),
        piece("b", "stop"),
        DONE,
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_understood(dialect: str) -> None:
    found = ask([STREAM, *DIALECTS[dialect]])
    assert (found.error, found.detail) == (None, "")
    assert found.text == "ab" and len(found.piece_times_s) == 2 and found.tokens == 2
    assert (found.answer_tokens is None) == (
        "no " in dialect or "completion" not in str(DIALECTS[dialect]) or "null" in dialect
    )


HTML = b"<html><head><title>502 Bad Gateway</title></head>\n<body>nginx</body></html>"
JSON = "Content-Type: application/json"
FAILURES: dict[str, tuple[list[Step], str, str]] = {
    "a page of HTML with an error": (
        [http(502, HTML, "Content-Type: text/html")],
        "http_502",
        "502 Bad Gateway",
    ),
    "a page of HTML without": (
        [http(200, HTML, "Content-Type: text/html; charset=utf-8")],
        "not_a_stream",
        "the answer is text/html",
    ),
    "an answer in one": ([http(200, b"{}", JSON)], "not_a_stream", "application/json"),
    "OpenAI's error": (
        [http(400, b'{"error": {"message": "too long", "code": 3}}', JSON)],
        "http_400",
        "too long",
    ),
    "an error in words": ([http(404, b'{"error": "no model"}', JSON)], "http_404", "no model"),
    "FastAPI's error": ([http(422, b'{"detail": [1]}', JSON)], "http_422", "[1]"),
    "a list for an error": ([http(500, b"[1, 2]", JSON)], "http_500", "[1, 2]"),
    "no body": ([http(503, b"")], "http_503", ""),
    "a redirection": ([http(307, b"", "Location: http://127.0.0.1:1/")], "http_307", ""),
    "an error amid the stream": (
        [STREAM, piece("a"), event(error={"message": "out of memory"}), DONE],
        "error_event",
        "out of memory",
    ),
    "an error of old": (
        [STREAM, event(object="error", message="broke", code=500)],
        "error_event",
        "broke",
    ),
    "no JSON": ([STREAM, piece("a"), b"data: {'a'\n\n", DONE], "bad_event", "must be a JSON"),
    "no object": ([STREAM, b"data: 3\n\n", DONE], "bad_event", "must be a JSON object"),
    "cut short": ([STREAM, piece("a"), piece("b")], "cut_short", "after 2 pieces"),
    "cut amid an event": ([STREAM, piece("a"), b'data: {"cho'], "cut_short", "after 1 pieces"),
    "nothing at all": ([STREAM], "cut_short", "after 0 pieces"),
    "no text": ([STREAM, piece("", "stop"), usage(3, 0), DONE], "empty", "stop"),
    "dropped before the answer": ([None], "dropped", "Disconnected"),
    "dropped amid it": (
        [
            STREAM.replace(b"Connection: close", b"Transfer-Encoding: chunked"),
            b"5\r\n: a\n\n\r\n",
            0.02,
            None,
        ],
        "dropped",
        "",
    ),
    "fewer bytes than promised": (
        [STREAM.replace(b"Connection: close", b"Content-Length: 999"), piece("a")],
        "dropped",
        "",
    ),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], "dropped", ""),
}


@pytest.mark.parametrize("case", FAILURES)
def test_every_failure_has_its_kind(case: str) -> None:
    steps, kind, words = FAILURES[case]
    found = ask(steps)
    assert found.error == kind and words in found.detail
    assert not found.is_answered and found.ended_s >= found.sent_s


def test_an_endless_event_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.serve.load.sse.LONGEST_EVENT", 1000)
    found = ask([STREAM, *([b"data: " + b"a" * 400] * 5), 30.0])
    assert found.error == "bad_event" and "at most 1000 bytes" in found.detail


def test_a_slow_answer_times_out() -> None:
    found = ask([STREAM, piece("a"), 30.0, piece("b"), DONE], timeout_s=0.1)
    assert found.error == "timeout" and found.detail == "not done in 0.1 s"
    assert ask([30.0], timeout_s=0.1).error == "timeout"


def test_nobody_there_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def run() -> Outcome:
            server = FakeServer()
            server.port = port
            return await asked(server)

        assert asyncio.run(run()).error == "refused"


def refusing(times: int, *headers: str, status: int = 429) -> tuple[Reply, list[int]]:
    """Return a reply that refuses the first requests, and the list it counts them in."""
    seen: list[int] = []

    def reply(asked: dict[str, Any]) -> list[Step]:
        seen.append(1)
        refusal: list[Step] = [http(status, b'{"error": {"message": "later"}}', *headers)]
        return refusal if len(seen) <= times else plain(asked)

    return reply, seen


@pytest.mark.parametrize("status", [429, 503])
def test_it_comes_again_when_it_is_told_to(status: int) -> None:
    reply, seen = refusing(2, "Retry-After: 0", status=status)
    found = ask(reply, max_retries=2)
    assert found.is_answered and found.retries == 2 and len(seen) == 3


def test_it_waits_as_long_as_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("deepseek.serve.load.client.asyncio.sleep", sleep)
    assert ask(refusing(1, "Retry-After: 3")[0], max_retries=1).is_answered
    assert ask(refusing(1, "Retry-After: 9999")[0], max_retries=1).is_answered
    assert waits == [3.0, 30.0]


@pytest.mark.parametrize(
    ("headers", "status", "retries"),
    [
        (["Retry-After: 0"], 429, 0),
        ([], 429, 3),
        (["Retry-After: soon"], 429, 3),
        (["Retry-After: Fri, 31 Dec 1999 23:59:59 GMT"], 429, 3),
        (["Retry-After: 0"], 500, 3),
    ],
)
def test_it_does_not_come_again_otherwise(headers: list[str], status: int, retries: int) -> None:
    reply, seen = refusing(1, *headers, status=status)
    found = ask(reply, max_retries=retries)
    assert found.error == f"http_{status}" and found.detail == "later" and len(seen) == 1


def test_retries_end() -> None:
    reply, seen = refusing(9, "Retry-After: 0")
    found = ask(reply, max_retries=2)
    assert found.error == "http_429" and len(seen) == 3 and found.retries == 2


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_user_hangs_up(after: int) -> None:
    steps: list[Step] = [STREAM, piece("a"), 0.02, piece("b"), *([0.02, piece("c")] * 200), DONE]

    async def run() -> tuple[Outcome, int]:
        async with FakeServer(lambda asked: steps) as server:
            found = await asked(server, hang_up_after=after)
            for _ in range(500):
                if server.num_lost:
                    break
                await asyncio.sleep(0.01)
            return found, server.num_lost

    found, lost = asyncio.run(run())
    assert found.hung_up and not found.is_answered and found.error is None
    assert len(found.piece_times_s) == after and lost == 1


def test_what_is_asked_is_what_openai_says() -> None:
    async def run(**settings: Any) -> tuple[dict[str, Any], dict[str, str]]:
        async with FakeServer() as server:
            await asked(server, **settings)
            return server.asked[0], server.headers[0]

    body, headers = asyncio.run(run(api_key="secret"))
    assert body.pop("path") == "/v1/completions" and headers["authorization"] == "bearer secret"
    assert headers["connection"] == "close"  # each user has a connection of its own
    assert body == {
        "model": "fake",
        "prompt": "hello",
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    body, headers = asyncio.run(run(endpoint="chat", natural_end=True))
    assert body["path"] == "/v1/chat/completions" and body["messages"] == HELLO
    assert "prompt" not in body and "ignore_eos" not in body and "authorization" not in headers


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/v3", "https://h/v3"),
    ],
)
def test_the_address_may_have_a_path(given: str, base: str) -> None:
    assert Target(url=given).base == base


@pytest.mark.parametrize("given", ["h:1", "localhost:8000", "ftp://h", "http://", ""])
def test_an_address_that_is_none_is_told(given: str) -> None:
    with pytest.raises(ConfigError, match="must be an address like http"):
        Target(url=given)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(Target(url="http://h", api_key="secret"))


def test_the_first_model_is_asked_for() -> None:
    async def run(reply: bytes | None) -> str:
        async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply or b"")
            writer.close()

        server = await asyncio.start_server(one, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            async with Client(Target(url=f"http://127.0.0.1:{port}")) as client:
                return await client.first_model()

    assert asyncio.run(run(http(200, b'{"data": [{"id": "m"}, {"id": "n"}]}', JSON))) == "m"
    for wrong in (http(200, b'{"data": []}'), http(200, HTML), http(404, b"{}"), http(200, b"3")):
        with pytest.raises(BackendError, match=r"lists its models at .*/v1/models; got 'HTTP"):
            asyncio.run(run(wrong))
    with pytest.raises(BackendError, match="Give its name by --model"):
        asyncio.run(run(None))
