"""The real `openai` client asks for responses, streams, continues, reads and deletes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from deepseek.errors import CapacityError
from deepseek.serve.api.routes.responses import responses_router
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.responses import ResponseLimits, ResponseStore
from tests.serve.api.stub import FakeChat, app_of, current_tenant, served

CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
    {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
]
TOOL: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    opened = open_database(tmp_path_factory.mktemp("state") / "state.db")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def chat() -> FakeChat:
    return FakeChat()


@pytest.fixture(scope="module")
def store(database: Database) -> ResponseStore:
    return ResponseStore(database, ResponseLimits(tenant_bytes=200_000))


@pytest.fixture(scope="module")
def address(store: ResponseStore, chat: FakeChat) -> Iterator[str]:
    with served(app_of(responses_router(store, chat, current_tenant))) as url:
        yield url


@pytest.fixture(autouse=True)
def fresh(chat: FakeChat) -> None:
    vars(chat).update(vars(FakeChat()))


def client_of(address: str, tenant: str = "alice") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=tenant, max_retries=0, timeout=30)


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as made:
        yield made


def strictly(response: Response) -> Response:
    """Check a response against every type that the client declares, which it does not do itself."""
    return TypeAdapter(Response).validate_python(response.model_dump(by_alias=True))


def test_a_text_is_answered(client: OpenAI, chat: FakeChat) -> None:
    made = strictly(
        client.responses.create(
            model="small", input="Hi", instructions="Be kind.", metadata={"a": "b"}, temperature=0.5
        )
    )
    assert made.output_text == "Hello!" and made.status == "completed" and made.store
    assert made.metadata == {"a": "b"} and made.temperature == 0.5
    assert made.usage and made.usage.input_tokens == 10 and made.usage.output_tokens == 3
    assert made.usage.input_tokens_details.cached_tokens == 4
    assert chat.asked[0]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    assert chat.tenants == ["alice"]


def test_a_cut_off_answer_says_so(client: OpenAI, chat: FakeChat) -> None:
    chat.finish_reason = "length"
    made = strictly(client.responses.create(model="small", input="Hi", max_output_tokens=3))
    assert made.status == "incomplete" and made.incomplete_details
    assert made.incomplete_details.reason == "max_output_tokens"
    assert chat.asked[0]["max_completion_tokens"] == 3


def test_a_conversation_goes_on(client: OpenAI, chat: FakeChat) -> None:
    first = client.responses.create(model="small", input="One", instructions="Only now.")
    chat.message = {"content": "Again!"}
    second = client.responses.create(
        model="small", input=[{"role": "user", "content": "Two"}], previous_response_id=first.id
    )
    third = client.responses.create(model="small", input="Three", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    assert [message["content"] for message in chat.asked[2]["messages"]] == [
        *("One", "Hello!", "Two", "Again!", "Three")
    ]


def test_kept_responses_are_read_and_deleted(client: OpenAI, address: str) -> None:
    made = client.responses.create(
        model="small",
        input=[{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}],
    )
    assert client.responses.retrieve(made.id) == made
    items = list(client.responses.input_items.list(made.id, order="asc", limit=1))
    shown = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert shown == ["One", "Two"]
    newest = client.responses.input_items.list(made.id, limit=1)
    assert newest.data[0].id == items[1].id and newest.has_more
    with client_of(address, "mallory") as other:
        for ask in (
            other.responses.retrieve,
            other.responses.delete,
            other.responses.cancel,
            other.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.create(model="small", input="x", previous_response_id=made.id)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(made.id)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="No such response"):
        client.responses.retrieve(made.id)


def test_what_is_not_to_be_kept_is_not(client: OpenAI) -> None:
    made = client.responses.create(model="small", input="Hi", store=False)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_what_cannot_be_kept_says_so(
    client: OpenAI, store: ResponseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CapacityError("disk of /secret/path is full")

    monkeypatch.setattr(store, "put", full)
    made = client.responses.create(model="small", input="Hi")
    assert made.output_text == "Hello!" and made.store is False
    monkeypatch.setattr(store, "get", full)
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.retrieve(made.id)
    assert caught.value.status_code == 503 and "secret" not in str(caught.value)


def test_functions_are_called_and_answered(client: OpenAI, chat: FakeChat) -> None:
    chat.message = {"content": None, "tool_calls": CALLS}
    chat.finish_reason = "tool_calls"
    made = strictly(client.responses.create(model="small", input="Add", tools=[TOOL]))
    calls = [item for item in made.output if item.type == "function_call"]
    assert [(call.call_id, call.name, call.arguments) for call in calls] == [
        ("call_1", "add", '{"a": 1}'),
        ("call_2", "add", '{"a": 2}'),
    ]
    chat.message, chat.finish_reason = {"content": "3"}, "stop"
    output: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls
    ]
    client.responses.create(model="small", input=output, previous_response_id=made.id)
    roles = [message["role"] for message in chat.asked[1]["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]
    # The same without the store: the client sends everything back.
    back: Any = [{"role": "user", "content": "Add"}, *made.to_dict()["output"], *output]  # type: ignore[misc]
    client.responses.create(model="small", input=back, store=False)
    assert chat.asked[2]["messages"] == chat.asked[1]["messages"]


def test_structured_answers_are_parsed(client: OpenAI, chat: FakeChat) -> None:
    class Sum(BaseModel):
        value: int

    chat.message = {"content": '{"value": 3}'}
    made = client.responses.parse(model="small", input="Add", text_format=Sum)
    assert made.output_parsed == Sum(value=3)
    sent = chat.asked[0]["response_format"]
    assert sent["json_schema"]["name"] == "Sum" and sent["json_schema"]["strict"] is True


def test_logprobs_come_with_the_text(client: OpenAI, chat: FakeChat) -> None:
    top = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    chat.logprobs = [{**top, "top_logprobs": [top]}]
    made = strictly(
        client.responses.create(
            model="small", input="x", include=["message.output_text.logprobs"], top_logprobs=1
        )
    )
    part = made.output[0].content[0]  # type: ignore[union-attr]
    assert part.logprobs[0].top_logprobs[0].logprob == -0.5  # type: ignore[union-attr,index]
    assert chat.asked[0]["logprobs"] is True and chat.asked[0]["top_logprobs"] == 1


def events_of(client: OpenAI, **more: Any) -> list[Any]:
    """Return the events of a stream, checked against every type that the client declares."""
    with client.responses.create(model="small", input="Hi", stream=True, **more) as stream:
        events = list(stream)
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for number, event in enumerate(events):
        adapter.validate_python(event.model_dump(by_alias=True))
        assert event.sequence_number == number
    return events


def test_a_text_is_streamed_event_by_event(client: OpenAI, chat: FakeChat) -> None:
    chat.message = {"content": "one two"}
    events = events_of(client)
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    final = strictly(events[-1].response)
    assert events[6].text == final.output_text == "onetwo"
    assert events[8].item == final.output[0] and final.usage.total_tokens == 13
    assert client.responses.retrieve(final.id) == final
    assert {event.item_id for event in events[3:8]} == {final.output[0].id}
    assert chat.asked[0]["stream_options"] == {"include_usage": True} and chat.closed == 1


def test_calls_are_streamed(client: OpenAI, chat: FakeChat) -> None:
    chat.message, chat.finish_reason = {"content": "Well", "tool_calls": CALLS}, "tool_calls"
    events = events_of(client, tools=[TOOL])
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == ['{"a": 1}', '{"a": 2}']
    for event in done:
        deltas = [
            one.delta
            for one in events
            if one.type == "response.function_call_arguments.delta" and one.item_id == event.item_id
        ]
        assert "".join(deltas) == event.arguments and len(deltas) == 8
    added = [event for event in events if event.type == "response.output_item.added"]
    finished = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in added] == [0, 1, 2]
    assert sorted(event.output_index for event in finished) == [0, 1, 2]
    kinds = [item.type for item in events[-1].response.output]
    assert kinds == ["message", "function_call", "function_call"]


def test_the_clients_own_assembly_agrees(client: OpenAI, chat: FakeChat) -> None:
    chat.message = {"content": "a b c", "tool_calls": CALLS}
    with client.responses.stream(model="small", input="Hi", tools=[TOOL]) as stream:
        stream.until_done()
        final = stream.get_final_response()
    assert final.output_text == "abc"
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]


def test_an_empty_answer_is_an_empty_message(client: OpenAI, chat: FakeChat) -> None:
    chat.message = {}
    events = events_of(client)
    assert events[-1].response.output_text == ""
    assert [item.type for item in events[-1].response.output] == ["message"]
    assert client.responses.create(model="small", input="Hi").output_text == ""


def test_a_stream_that_is_cut_off_is_incomplete(client: OpenAI, chat: FakeChat) -> None:
    chat.finish_reason = "length"
    final = events_of(client)[-1]
    assert final.type == "response.incomplete"
    assert final.response.output[0].status == "incomplete"


def test_a_stream_that_breaks_fails_and_tells_no_secret(
    client: OpenAI, chat: FakeChat, caplog: pytest.LogCaptureFixture
) -> None:
    chat.error = RuntimeError("secret detail")
    events = events_of(client)
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert failed.error.code == "server_error" and "secret" not in failed.to_json()
    assert failed.output[0].status == "incomplete" and chat.closed == 1
    assert client.responses.retrieve(failed.id).status == "failed"
    assert "secret detail" in caplog.text


def test_a_client_that_goes_away_ends_the_chat(
    client: OpenAI, chat: FakeChat, address: str
) -> None:
    import socket
    import time

    chat.message = {"content": " ".join("word" for _ in range(200_000))}
    body = json.dumps({"model": "m", "input": "Hi", "stream": True})
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            f"POST /v1/responses HTTP/1.1\r\nhost: x\r\nauthorization: Bearer alice\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert b"200 OK" in raw.recv(1000)
    deadline = time.monotonic() + 30
    while not chat.closed:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_too_long_a_conversation_loses_its_oldest_turns(client: OpenAI, chat: FakeChat) -> None:
    chat.most_messages = 3
    turns: Any = [
        {"role": role, "content": f"{number}"}
        for number in range(4)
        for role in ("user", "assistant")
    ][:-1]
    with pytest.raises(openai.BadRequestError, match="Too long"):
        client.responses.create(model="small", input=turns)
    made = client.responses.create(model="small", input=turns, truncation="auto")
    assert made.truncation == "auto"
    assert [message["content"] for message in chat.asked[-1]["messages"]] == ["2", "2", "3"]
    chat.most_messages = 0
    with pytest.raises(openai.BadRequestError, match="Too long"):
        client.responses.create(model="small", input=turns, truncation="auto")


def test_bad_requests_are_told_in_openais_form(client: OpenAI, address: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="small", input="x", temperature=3)
    assert caught.value.body["param"] == "temperature"  # type: ignore[index,call-overload]
    for more in (
        {"extra_body": {"nonsense": 1}},
        {"background": True},
        {"tools": [{"type": "mcp"}]},
    ):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="small", input="x", **more)  # type: ignore[arg-type,call-overload]
    with client_of(address, "wrong") as other, pytest.raises(openai.AuthenticationError):
        other.responses.create(model="small", input="x")
    for name in ("resp_x", "resp_" + "0" * 32, "..%2F..", "\U0001f600", "\0"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
