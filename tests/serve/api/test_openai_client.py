"""OpenAI's own client against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
import uvicorn

from deepseek.serve.api import TenantLimits, create_app, make_server
from deepseek.serve.generation import EngineError
from tests.serve.api.support import HELLO, KEY, OTHER_KEY, settings
from tests.serve.fakes import FakeGenerator

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Bern"}}</tool_call>'


class Place:
    """A running server, and its fake engine."""

    def __init__(self, server: uvicorn.Server, generator: FakeGenerator, port: int) -> None:
        self.server = server
        self.generator = generator
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=self.url, max_retries=0, timeout=10)

    def async_client(self, key: str = KEY) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=key, base_url=self.url, max_retries=0, timeout=10)


@contextlib.contextmanager
def serving(**rest: Any) -> Iterator[Place]:
    """Run a server in a thread."""
    generator, chosen = FakeGenerator(), settings(**rest)
    server = make_server(create_app(generator, settings=chosen), chosen, port=0)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield Place(server, generator, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared() -> Iterator[Place]:
    """Return a server for all tests of this file."""
    with serving() as place:
        yield place


@pytest.fixture
def place(shared: Place) -> Place:
    """Return the server with an engine that says hello."""
    shared.generator.text = "Hello there."
    shared.generator.error = shared.generator.gate = None
    shared.generator.requests.clear()
    return shared


def test_a_chat(place: Place) -> None:
    with place.client() as client:
        answer = client.chat.completions.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "Hello there."
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer._request_id and answer._request_id.startswith("req-")


def test_streams_and_several_answers(place: Place) -> None:
    with place.client() as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=HELLO,  # type: ignore[arg-type]
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts, usage = ["", ""], None
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello there."] * 2
    assert usage and usage.completion_tokens == 26


@pytest.mark.parametrize("stream", [False, True])
def test_tools(place: Place, stream: bool) -> None:
    place.generator.text = CALL + CALL
    with place.client() as client:
        if stream:
            with client.chat.completions.stream(
                model="tiny",
                messages=HELLO,  # type: ignore[arg-type]
                tools=[WEATHER],
            ) as events:
                events.until_done()
                message = events.get_final_completion().choices[0].message
        else:
            answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])  # type: ignore[arg-type]
            assert answer.choices[0].finish_reason == "tool_calls"
            message = answer.choices[0].message
    assert message.tool_calls and len(message.tool_calls) == 2
    assert len({call.id for call in message.tool_calls}) == 2
    for call in message.tool_calls:
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"place": "Bern"}


class Point(pydantic.BaseModel):
    """What the model has to answer."""

    x: int
    y: int


def test_a_json_schema_is_parsed(place: Place) -> None:
    place.generator.text = '{"x": 1, "y": 2}'
    with place.client() as client:
        answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Point)  # type: ignore[arg-type]
    assert answer.choices[0].message.parsed == Point(x=1, y=2)
    assert place.generator.requests[0].grammar is not None


def test_completions_and_models(place: Place) -> None:
    with place.client() as client:
        answer = client.completions.create(
            model="tiny", prompt=["a", "b"], echo=True, logprobs=1, max_tokens=2
        )
        assert [choice.text for choice in answer.choices] == ["aHe", "bHe"]
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.tokens == ["a", "H", "e"]
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "deepseek"


def test_the_asynchronous_client(place: Place) -> None:
    async def work() -> list[str]:
        async with place.async_client() as client:

            async def ask() -> str:
                stream = await client.chat.completions.create(
                    model="tiny",
                    messages=HELLO,  # type: ignore[arg-type]
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(ask() for _ in range(8)))

    assert asyncio.run(work()) == ["Hello there."] * 8


def test_errors_have_their_types(place: Place) -> None:
    def ask(client: openai.OpenAI, **fields: Any) -> Any:
        return client.chat.completions.create(**({"model": "tiny", "messages": HELLO} | fields))

    with place.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        ask(client)
    with place.client() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            ask(client, temperature=5)
        assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
        with pytest.raises(openai.BadRequestError) as long:
            ask(client, max_tokens=100_000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            ask(client, model="gone")
        place.generator.error, place.generator.error_at = EngineError("dead"), 0
        with pytest.raises(openai.InternalServerError) as dead:
            ask(client)
        assert dead.value.status_code == 503 and dead.value.code == "engine_error"
        place.generator.error, place.generator.error_at = RuntimeError("inside"), 3
        with pytest.raises(openai.APIError) as broken:
            list(ask(client, stream=True))
        assert broken.value.code == "internal_error" and "inside" not in str(broken.value)


def test_attack_24_a_client_that_closes_its_stream_ends_the_answer(place: Place) -> None:
    before = place.generator.cancelled
    place.generator.gate, place.generator.gate_at = asyncio.Event(), 5
    with place.client() as client:
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)  # type: ignore[arg-type]
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 5
    while place.generator.running and time.monotonic() < deadline:
        time.sleep(0.005)
    assert place.generator.running == 0 and place.generator.cancelled == before + 1


def test_limits_have_their_type_and_others_go_on() -> None:
    with serving(limits=TenantLimits(requests_per_minute=1)) as place:
        with place.client() as client:
            client.models.list()
            with pytest.raises(openai.RateLimitError) as limit:
                client.models.list()
            assert limit.value.response.headers["retry-after"]
        with place.client(OTHER_KEY) as client:
            assert client.models.list().data


def ask_raw(port: int, data: bytes) -> bytes:
    """Return all that a server says to some bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def test_attack_18_headers_that_do_not_come_or_do_not_end() -> None:
    with serving(header_timeout_s=0.1) as place:
        assert ask_raw(place.port, b"") == b""
        assert ask_raw(place.port, HEAD) == b""
        with socket.create_connection(("127.0.0.1", place.port), timeout=5) as connection:
            connection.sendall(HEAD + b"\r\n")
            answer = b""
            while not answer.endswith(b'"ok"}'):
                answer += connection.recv(65536)
            connection.sendall(HEAD)
            assert connection.recv(65536) == b""
        huge = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000
        assert b" 400 " in ask_raw(place.port, huge)[:20]
        body = HEAD.replace(b"GET /health", b"POST /tokenize") + b"Connection: close\r\n"
        body += f"Authorization: Bearer {KEY}\r\nContent-Length: 99999999\r\n\r\n".encode()
        assert b" 413 " in ask_raw(place.port, body)[:20]
        assert b"server: " not in ask_raw(place.port, HEAD + b"Connection: close\r\n\r\n").lower()


def test_a_server_that_is_told_to_stop_finishes_its_streams() -> None:
    with serving() as place, place.client() as client:
        place.generator.text = "y" * 2000
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)  # type: ignore[arg-type]
        chunks = iter(stream)
        next(chunks)
        place.server.should_exit = True
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(text) in (1999, 2000)
