"""The real `openai` client asks for responses in the background, follows and cancels them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from deepseek.serve.api.background import Background, BackgroundConfig
from deepseek.serve.api.errors import ApiError
from deepseek.serve.api.routes.responses import responses_router
from deepseek.serve.state.database import open_database
from deepseek.serve.state.responses import ResponseLimits, ResponseStore
from tests.serve.api.stub import FakeChat, app_of, current_tenant, served

CONFIG = BackgroundConfig(concurrency=2, poll_s=0.02, grace_s=0.05, kept_streams=2)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class Bench:
    """A server whose chat does what a test says, and what it charged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chat = FakeChat(is_held=True)
        self.settled: list[int] = []
        self.refusal: ApiError | None = None

    def serve(self, limits: ResponseLimits | None = None) -> Iterator[str]:
        database = open_database(self.folder / "state.db")
        store = ResponseStore(database, limits)
        background = Background(store, self.chat, self._admit, CONFIG)
        router = responses_router(store, self.chat, current_tenant, background)
        with served(app_of(router), background) as url:
            yield url
        database.close()

    async def _admit(self, tenant: Any, body: dict[str, Any]) -> Callable[[int], None]:
        if self.refusal is not None:
            raise self.refusal
        return self.settled.append


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def address(bench: Bench) -> Iterator[str]:
    yield from bench.serve(ResponseLimits(tenant_unfinished=4))


def client_of(address: str, tenant: str = "alice") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=tenant, max_retries=0, timeout=30)


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as made:
        yield made


def ask(client: OpenAI, text: str = "Hi", **fields: Any) -> Response:
    made = client.responses.create(model="small", input=text, background=True, **fields)
    return TypeAdapter(Response).validate_python(made.model_dump(by_alias=True))


def wait(client: OpenAI, response_id: str, *statuses: str) -> Response:
    deadline = time.monotonic() + 20
    while (found := client.responses.retrieve(response_id)).status not in statuses:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return TypeAdapter(Response).validate_python(found.model_dump(by_alias=True))


def test_it_is_queued_worked_on_and_completed(client: OpenAI, bench: Bench) -> None:
    made = ask(client, instructions="Be kind.", temperature=0.5)
    assert made.status == "queued" and made.background and made.output == []
    wait(client, made.id, "in_progress")
    bench.chat.is_held = False
    found = wait(client, made.id, "completed")
    assert found.output_text == "Hello!" and found.usage and found.usage.total_tokens == 13
    assert found.background and found.temperature == 0.5
    assert bench.settled == [13]
    asked = bench.chat.asked[-1]
    assert asked["priority"] == 500 and asked["temperature"] == 0.5
    assert [message["content"] for message in asked["messages"]] == ["Be kind.", "Hi"]
    items = client.responses.input_items.list(made.id).data
    assert items[0].content[0].text == "Hi"  # type: ignore[union-attr]


def test_a_conversation_goes_on_from_it_once_it_has_ended(client: OpenAI, bench: Bench) -> None:
    first = ask(client, "One")
    with pytest.raises(openai.BadRequestError, match="one that has ended"):
        client.responses.create(model="small", input="Two", previous_response_id=first.id)
    bench.chat.is_held = False
    wait(client, first.id, "completed")
    second = ask(client, "Two", previous_response_id=first.id)
    wait(client, second.id, "completed")
    said = [message["content"] for message in bench.chat.asked[-1]["messages"]]
    assert said == ["One", "Hello!", "Two"]


def test_it_is_cancelled_while_it_waits_and_while_it_runs(client: OpenAI, bench: Bench) -> None:
    made = [ask(client, str(number)) for number in range(3)]
    wait(client, made[1].id, "in_progress")
    assert client.responses.retrieve(made[2].id).status == "queued"
    for one in (made[2], made[2], made[0]):
        assert client.responses.cancel(one.id).status == "cancelled"
    assert bench.chat.closed == 1, "the engine works on one that was cancelled"
    assert bench.settled == [0], "what one under way has used is charged"
    bench.chat.is_held = False
    done = wait(client, made[1].id, "completed")
    assert client.responses.cancel(made[1].id).output_text == done.output_text
    for one in (made[0], made[2]):
        found = client.responses.retrieve(one.id)
        assert found.status == "cancelled" and found.output == []
    waited = client.responses.create(model="small", input="Hi")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(waited.id)


def test_a_deleted_one_is_given_up(client: OpenAI, bench: Bench) -> None:
    made = ask(client)
    wait(client, made.id, "in_progress")
    client.responses.delete(made.id)
    assert bench.chat.closed == 1
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_others_neither_see_nor_cancel_nor_follow_it(client: OpenAI, address: str) -> None:
    made = ask(client)
    with client_of(address, "mallory") as other:
        for steal in (
            other.responses.retrieve,
            other.responses.cancel,
            other.responses.delete,
            lambda name: other.responses.retrieve(name, stream=True),
        ):
            with pytest.raises(openai.NotFoundError):
                steal(made.id)
    assert client.responses.retrieve(made.id).status in ("queued", "in_progress")


def test_a_flood_is_refused_and_holds_up_nobody(client: OpenAI, address: str, bench: Bench) -> None:
    made = [ask(client) for _ in range(4)]
    with pytest.raises(openai.RateLimitError, match="at most 4"):
        ask(client)
    assert bench.settled == [0], "what was not taken in is charged"
    wait(client, made[1].id, "in_progress")
    with client_of(address, "bob") as other:
        mine = ask(other)
        client.responses.cancel(made[0].id)
        wait(other, mine.id, "in_progress")
        assert client.responses.retrieve(made[2].id).status == "queued"
        bench.chat.is_held = False
        wait(other, mine.id, "completed")


def test_what_cannot_be_is_refused_at_once(client: OpenAI, bench: Bench) -> None:
    with pytest.raises(openai.BadRequestError, match="needs store"):
        ask(client, store=False)
    bench.refusal = ApiError(404, "No such model.", code="model_not_found")
    with pytest.raises(openai.NotFoundError, match="No such model"):
        ask(client)
    assert bench.chat.asked == [] and bench.settled == []


def test_a_busy_engine_is_asked_again(client: OpenAI, bench: Bench) -> None:
    bench.chat.is_held = False
    bench.chat.refusals = [ApiError(503, "Busy."), ApiError(429, "Too many.")]
    assert wait(client, ask(client).id, "completed").output_text == "Hello!"
    assert len(bench.chat.asked) == 3


def test_what_fails_says_why(client: OpenAI, bench: Bench) -> None:
    bench.chat.is_held = False
    bench.chat.refusals = [ApiError(400, "The adapter is gone.")]
    found = wait(client, ask(client).id, "failed")
    assert found.error and found.error.message == "The adapter is gone."
    bench.chat.error = RuntimeError("secret of the inside")
    found = wait(client, ask(client).id, "failed")
    assert found.error and "secret" not in found.error.message


def test_a_stream_is_left_and_taken_up_again(client: OpenAI, bench: Bench) -> None:
    bench.chat.message = {"content": "one two three four"}
    stream = client.responses.create(model="small", input="Hi", background=True, stream=True)
    first = [next(stream) for _ in range(3)]
    stream.close()
    assert [event.type for event in first] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    response_id = first[0].response.id  # type: ignore[union-attr]
    bench.chat.is_held = False
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=2))
    for event in rest:
        EVENT.validate_python(event.model_dump(by_alias=True))
    numbers = [event.sequence_number for event in [*first, *rest]]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.output_text == "onetwothreefour"  # type: ignore[union-attr]
    kept = client.responses.retrieve(response_id)
    assert rest[-1].response.output == kept.output  # type: ignore[union-attr]
    with client.responses.stream(response_id=response_id, starting_after=4) as again:
        seen = [event.sequence_number for event in again]
        assert again.get_final_response().output_text == "onetwothreefour"
    assert seen == numbers[5:]


def test_a_cancelled_stream_ends(client: OpenAI, bench: Bench) -> None:
    stream = client.responses.create(model="small", input="Hi", background=True, stream=True)
    response_id = next(stream).response.id  # type: ignore[union-attr]
    wait(client, response_id, "in_progress")
    client.responses.cancel(response_id)
    assert "response.completed" not in [event.type for event in stream]


def test_streams_that_have_ended_are_kept_for_a_while(client: OpenAI, bench: Bench) -> None:
    bench.chat.is_held = False
    names = []
    for _ in range(3):
        stream = client.responses.create(model="small", input="Hi", background=True, stream=True)
        names.append(next(stream).response.id)  # type: ignore[union-attr]
        assert [*stream][-1].type == "response.completed"
    with pytest.raises(openai.BadRequestError, match="Read it without stream"):
        client.responses.retrieve(names[0], stream=True)
    assert len([*client.responses.retrieve(names[1], stream=True)]) > 3
    plain = ask(client)
    with pytest.raises(openai.BadRequestError, match="Read it without stream"):
        client.responses.retrieve(plain.id, stream=True)
    waited = client.responses.create(model="small", input="Hi")
    with pytest.raises(openai.BadRequestError, match="cannot be streamed again"):
        client.responses.retrieve(waited.id, stream=True)


def test_a_restart_goes_on_with_what_has_not_ended(bench: Bench) -> None:
    serving = bench.serve()
    with client_of(next(serving)) as client:
        made = [ask(client, str(number)) for number in range(3)]
        wait(client, made[0].id, "in_progress")
        cancelled = ask(client)
        client.responses.cancel(cancelled.id)
    next(serving, None)
    bench.chat.is_held = False
    serving = bench.serve()
    with client_of(next(serving)) as client:
        for one in made:
            assert wait(client, one.id, "completed").output_text == "Hello!"
        assert client.responses.retrieve(cancelled.id).status == "cancelled"
    next(serving, None)
    said = [asked["messages"][0]["content"] for asked in bench.chat.asked]
    assert sorted(said) == ["0", "0", "1", "1", "2"]
