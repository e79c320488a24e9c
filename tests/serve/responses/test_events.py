"""Chunks of a chat become events, in order, and their source is closed whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from deepseek.serve.responses.answer import begun
from deepseek.serve.responses.events import response_events
from deepseek.serve.responses.request import ResponseRequest


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": None}]}


def call(index: int, arguments: str, **head: Any) -> dict[str, Any]:
    function = {"arguments": arguments, **head}
    return delta(tool_calls=[{"index": index, "id": f"call_{index}", "function": function}])


class Chunks:
    """A source of chunks that tells whether it was closed."""

    def __init__(self, *chunks: Mapping[str, Any]) -> None:
        self.chunks = chunks
        self.is_closed = False

    async def __call__(self) -> AsyncGenerator[Mapping[str, Any]]:
        try:
            for chunk in self.chunks:
                yield chunk
        finally:
            self.is_closed = True


def events_of(source: Chunks) -> list[dict[str, Any]]:
    """Return the events of a stream, whose source must be closed before the last one comes."""

    async def save(final: dict[str, Any]) -> dict[str, Any]:
        assert source.is_closed
        return final

    async def collect() -> list[dict[str, Any]]:
        response = begun(ResponseRequest(model="m", input="x"))
        return [event async for event in response_events(response, source(), save)]

    events = asyncio.run(collect())
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_an_error_among_the_chunks_ends_the_stream() -> None:
    error = {"error": {"message": "The deadline has passed."}}
    events = events_of(Chunks(delta(content="a"), error, delta(content="never")))
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.failed"
    assert final["error"] == {"code": "server_error", "message": "The deadline has passed."}
    assert final["output"][0]["content"][0]["text"] == "a"
    assert final["output"][0]["status"] == "incomplete"


def test_whoever_stops_reading_closes_the_source() -> None:
    source = Chunks(delta(content="a"), delta(content="b"))

    async def read_some() -> bool:
        async def save(final: dict[str, Any]) -> dict[str, Any]:
            raise AssertionError("it is not finished")

        response = begun(ResponseRequest(model="m", input="x"))
        events = response_events(response, source(), save)
        async for event in events:
            if event["type"] == "response.output_text.delta":
                break
        await events.aclose()
        return source.is_closed

    assert asyncio.run(read_some())


def test_a_message_is_closed_before_a_call_and_calls_may_interleave() -> None:
    events = events_of(
        Chunks(
            delta(content="first"),
            call(0, "{", name="f"),
            call(1, "[", name="g"),
            call(0, "}"),
            call(1, "]"),
            delta(content="second"),
        )
    )
    steps = [
        (event["type"].removeprefix("response."), event["output_index"])
        for event in events
        if "output_item" in event["type"]
    ]
    assert steps == [
        ("output_item.added", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("output_item.added", 2),
        ("output_item.added", 3),
        ("output_item.done", 3),
        ("output_item.done", 1),
        ("output_item.done", 2),
    ]
    output = events[-1]["response"]["output"]
    assert [item.get("arguments") or item["content"][0]["text"] for item in output] == [
        *("first", "{}", "[]", "second")
    ]
    assert {item["status"] for item in output} == {"completed"}
