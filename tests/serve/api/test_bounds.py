"""What is asked is bounded, and what is wrong with it is said with a 400."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.serve.api.strict_json import find_problem
from tests.serve.api.support import (
    HEADERS,
    HELLO,
    Caller,
    call,
    chat,
    error_of,
    make_app,
    post,
    run,
)
from tests.serve.fakes import FakeGenerator

NUMBERS: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 17),
    ("n", 10**6),
    ("n", -1),
    ("n", 1.5),
    ("n", "1"),
    ("n", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", 1e308),
    ("temperature", "hot"),
    ("top_p", 1.1),
    ("top_p", -1),
    ("top_k", -2),
    ("top_k", 10**30),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 0.5),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 10**12),
    ("max_completion_tokens", 0),
    ("min_tokens", -1),
    ("top_logprobs", 21),
    ("top_logprobs", -1),
    ("deadline_ms", 0),
    ("deadline_ms", -1),
    ("priority", -1),
    ("priority", 10**9),
    ("stop", ""),
    ("stop", ["a"] * 5),
    ("stop", ["x" * 257]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**40]),
    ("stop_token_ids", [10**6]),
    ("stop_token_ids", [1] * 65),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "5"}),
    ("logit_bias", {"999999": 1}),
    ("logit_bias", {str(key): 1 for key in range(301)}),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("user", "u" * 513),
    ("model", "m" * 257),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("structured_outputs", {}),
    ("structured_outputs", {"regex": "a", "json_object": True}),
    ("structured_outputs", {"regex": ""}),
    ("structured_outputs", {"choice": []}),
    ("structured_outputs", {"choice": ["a"] * 257}),
    ("structured_outputs", {"regex": "a" * (64 * 2**10 + 1)}),
    ("chat_template_kwargs", {"tools": []}),
    ("chat_template_kwargs", {"messages": [], "enable_thinking": True}),
]


@pytest.mark.parametrize(("field", "value"), NUMBERS, ids=lambda value: str(value)[:24])
def test_attack_9_fields_out_of_bounds(field: str, value: Any) -> None:
    generator = FakeGenerator()
    error = error_of(chat(make_app(generator), **{field: value}), 400)
    assert error["type"] == "invalid_request_error" and error["param"].startswith(field)
    assert generator.requests == []


def test_edges_of_bounds_are_allowed() -> None:
    generator = FakeGenerator()
    edges = {
        "n": 16,
        "temperature": 2,
        "top_p": 1,
        "top_k": -1,
        "seed": 2**63 - 1,
        "presence_penalty": -2,
        "logprobs": True,
        "top_logprobs": 20,
        "logit_bias": {str(key): -100 for key in range(259)},
        "stop": ["a", "b", "c", "d" * 256],
    }
    assert chat(make_app(generator), **edges).status_code == 200
    assert chat(make_app(generator), seed=-(2**63)).status_code == 200
    assert len(generator.requests) == 17


def test_attack_8_fan_out_is_charged_at_admission() -> None:
    generator = FakeGenerator()
    app = make_app(generator, max_request_tokens=500)
    assert chat(app, n=2, max_tokens=100).status_code == 200
    error = error_of(chat(app, n=16, max_tokens=100), 400)
    assert error["param"] == "max_tokens" and len(generator.requests) == 2


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hi",
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": 5}],
        [{"role": "assistant"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}],
        [{"role": "user", "content": "null \0 character"}],
        HELLO * 2049,
    ],
    ids=lambda value: str(value)[:30],
)
def test_attack_10_empty_and_malformed_messages(messages: Any) -> None:
    generator = FakeGenerator()
    error_of(chat(make_app(generator), messages=messages), 400)
    assert generator.requests == []


@pytest.mark.parametrize(
    "arguments", ["[]", "{", "5", '{"a":' * 5000, '{"a": "\\ud800"}'], ids=lambda a: a[:9]
)
def test_malformed_arguments_of_an_earlier_call(arguments: str) -> None:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    messages = [*HELLO, {"role": "assistant", "tool_calls": calls}]
    error_of(chat(make_app(), messages=messages), 400)


BODIES = {
    "nothing": b"",
    "no json": b"{",
    "a list": b"[]",
    "null": b"null",
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}',
    "overflow": b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    "huge number": b'{"messages": [{"role": "user", "content": "x"}], "seed": '
    + b"9" * 5000
    + b"}",
    "deep": b"[" * 100_000,
    "deep and closed": b'{"metadata": ' + b"[" * 150 + b"]" * 150 + b"}",
    "not UTF-8": b'{"messages": "\xff"}',
    "half a pair": b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    "null character": b'{"messages": [{"role": "user", "content": "\\u0000"}]}',
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_attack_10_bodies_that_are_not_json(case: str, path: str) -> None:
    headers = HEADERS | {"content-type": "application/json"}
    error_of(call(make_app(), "POST", path, content=BODIES[case], headers=headers), 400)


def test_another_content_type_is_refused() -> None:
    headers = HEADERS | {"content-type": "text/plain"}
    error_of(call(make_app(), "POST", "/tokenize", content=b"{}", headers=headers), 400)


def deep(depth: int) -> dict[str, Any]:
    """Return a schema of a given depth."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [deep(40), {"enum": ["x" * 100] * 1000}, {"enum": [1] * 6000}],
    ids=["deep", "long", "many"],
)
def test_schemas_are_bounded(schema: Any) -> None:
    app = make_app()
    named = {"name": "x", "schema": schema}
    error_of(chat(app, response_format={"type": "json_schema", "json_schema": named}), 400)
    error_of(chat(app, structured_outputs={"json": schema}), 400)
    parameters = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    error_of(chat(app, tools=[tool]), 400)


@pytest.mark.parametrize("field", ["chat_template", "functions", "prompt_embeds", "guided_json"])
def test_attack_3_templates_and_tensors_of_a_request_are_refused(field: str) -> None:
    error = error_of(chat(make_app(), **{field: "{{ 7 * 7 }}"}), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_attack_3_a_message_is_never_a_template() -> None:
    generator = FakeGenerator()
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in range(9) %}y{% endfor %}"}]
    assert chat(make_app(generator), messages=messages).status_code == 200
    prompt = generator.tokenizer.decode(generator.requests[0].prompt)
    assert messages[0]["content"] in prompt


def test_unknown_fields_are_ignored() -> None:
    message = {"role": "user", "content": "Hi", "mood": 3}
    assert chat(make_app(), messages=[message], store=True, future_field=1).status_code == 200


@pytest.mark.parametrize("max_tokens", [None, 10])
def test_attack_27_a_prompt_that_is_too_long(max_tokens: int | None) -> None:
    generator = FakeGenerator(context=64)
    app = make_app(generator)
    messages = [{"role": "user", "content": "x" * 200}]
    error = error_of(chat(app, messages=messages, max_tokens=max_tokens), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "64" in error["message"]
    body = {"prompt": "x" * 60, "max_tokens": 5}
    error = error_of(post(app, "/v1/completions", body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert post(app, "/v1/completions", body | {"max_tokens": 4}).status_code == 200


def test_attack_18_bodies_are_bounded_while_they_come() -> None:
    app = make_app(max_body_bytes=1000)
    error_of(post(app, "/tokenize", {"prompt": "x" * 2000}), 413)

    async def work() -> int:
        caller = Caller(app, b"", path="/tokenize")
        caller.incoming.get_nowait()
        for _ in range(100):
            message = {"type": "http.request", "body": b" " * 100, "more_body": True}
            caller.incoming.put_nowait(message)
        await caller()
        assert caller.status == 413
        return caller.incoming.qsize()

    assert run(work()) == 100 - 11


def test_attack_18_a_body_that_does_not_come() -> None:
    async def work() -> Caller:
        caller = Caller(make_app(body_timeout_s=0.02), b"", path="/tokenize")
        caller.incoming.get_nowait()
        caller.incoming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        await caller()
        return caller

    caller = run(work())
    assert caller.status == 408 and b"body_timeout" in caller.body


def test_a_slow_answer_is_not_a_slow_body() -> None:
    async def work() -> Caller:
        generator = FakeGenerator()
        generator.gate = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, generator.gate.set)
        caller = Caller(make_app(generator, body_timeout_s=0.02), {"messages": HELLO})
        await caller()
        return caller

    assert run(work()).status == 200


def test_attack_18_headers_are_bounded() -> None:
    app = make_app()
    many = HEADERS | {f"x-{number}": "1" for number in range(70)}
    error_of(call(app, "GET", "/v1/models", headers=many), 431)
    error_of(call(app, "GET", "/v1/models", headers=HEADERS | {"x": "y" * 17_000}), 431)


def test_what_is_no_route() -> None:
    app = make_app()
    assert error_of(call(app, "GET", "/v1/nothing"), 404)["code"] == "not_found"
    response = call(app, "GET", "/v1/completions")
    assert error_of(response, 405)["code"] == "wrong_method"
    assert response.headers["allow"] == "POST"


def test_not_ready() -> None:
    generator = FakeGenerator()
    app = make_app(generator)
    assert call(app, "GET", "/ready").json() == {"status": "ok"}
    generator.ready = False
    response = call(app, "GET", "/ready")
    assert error_of(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"] == "2"
    error_of(chat(app), 503)
    assert call(app, "GET", "/health").status_code == 200
    assert call(app, "GET", "/version").json()["version"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values, st.integers(0, 5))
@settings(max_examples=100)
def test_depth_is_what_it_is(value: Any, limit: int) -> None:
    def depth(item: Any) -> int:
        if isinstance(item, dict | list):
            inner = [*item, *item.values()] if isinstance(item, dict) else item
            return 1 + max(map(depth, inner), default=0)
        return 0

    problem = find_problem(value, limit)
    if depth(value) > limit:
        assert problem
    else:
        assert not problem or "nested" not in problem
