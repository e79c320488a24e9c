"""The stream of a response: the events that OpenAI's clients put together again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from deepseek.serve.responses.answer import (
    call_item,
    ended,
    failed,
    item_status,
    message_item,
    text_logprobs,
    text_part,
)
from deepseek.serve.responses.items import Item, new_id

Event = dict[str, Any]

_LOG = logging.getLogger(__name__)
_LOST = "The server could not finish this response."


async def response_events(
    response: Mapping[str, Any],
    chunks: AsyncGenerator[Mapping[str, Any]],
    save: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    number: int = 0,
) -> AsyncGenerator[Event]:
    """Yield the events of a response.

    Args:
        response: as it was begun.
        chunks: of the chat; closed at the end, whoever ends it. An error among them, or from them,
            ends the stream by `response.failed`, not in the middle.
        save: keeps the finished response and returns it as it is shown; called before the last
            event, so that whoever has seen that can go on from it.
        number: of the first event; 2 where `queued_events` has told the first ones.
    """
    writer = _Writer(response, number)
    if number == 0:
        yield writer.event("response.created", response=dict(response))
    yield writer.event("response.in_progress", response=dict(response))
    trouble: str | None = None
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                if error := chunk.get("error"):
                    trouble = str(error.get("message", _LOST))
                    break
                for event in writer.add(chunk):
                    yield event
        except Exception:
            _LOG.exception("the stream of %s broke", response["id"])
            trouble = _LOST
    if trouble is None:
        for event in writer.end():
            yield event
        final = writer.result()
    else:
        final = failed(response, writer.cut_off(), trouble)
    final = await save(final)
    yield writer.event(f"response.{final['status']}", response=final)


def queued_events(response: Mapping[str, Any]) -> list[Event]:
    """Return the first events of a response that waits for its turn."""
    writer = _Writer(response, 0)
    kinds = "response.created", "response.queued"
    return [writer.event(kind, response=dict(response)) for kind in kinds]


class _Writer:
    """Puts chunks together and tells each step. One message is open at a time; calls stay open to
    the end, because chunks may go to and fro between them."""

    def __init__(self, response: Mapping[str, Any], number: int) -> None:
        self._response = response
        self._number = number
        self._output: list[Item] = []
        self._message: _Message | None = None
        self._calls: dict[int, _Call] = {}
        self._reason: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self._model: str | None = None

    def event(self, kind: str, **fields: Any) -> Event:
        made = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return made

    def add(self, chunk: Mapping[str, Any]) -> Iterator[Event]:
        """Yield the events of a chunk of the chat."""
        self._model = chunk.get("model") or self._model
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            self._reason = choice.get("finish_reason") or self._reason
            delta = choice.get("delta") or {}
            if text := delta.get("content"):
                yield from self._add_text(text, text_logprobs(choice))
            for call in delta.get("tool_calls") or ():
                yield from self._close_message("completed")
                yield from self._add_call(call)

    def end(self) -> Iterator[Event]:
        """Yield what closes the items."""
        if self._message is None and not self._output:
            yield from self._open_message()
        yield from self._close_message(item_status(self._reason))
        for call in self._calls.values():
            self._output[call.place] = done = call.item("completed")
            at = {"item_id": call.id, "output_index": call.place}
            yield self.event(
                "response.function_call_arguments.done",
                **at,
                name=call.name,
                arguments="".join(call.arguments),
            )
            yield self.event("response.output_item.done", output_index=call.place, item=done)

    def result(self) -> dict[str, Any]:
        """Return the finished response."""
        return ended(self._response, self._output, self._reason, self._usage, self._model)

    def cut_off(self) -> list[Item]:
        """Return what there is of the output when the stream breaks."""
        if self._message is not None:
            self._output[self._message.place] = self._message.item("incomplete")
        for call in self._calls.values():
            self._output[call.place] = call.item("incomplete")
        return self._output

    def _add_text(self, text: str, logprobs: list[Item] | None) -> Iterator[Event]:
        if self._message is None:
            yield from self._open_message()
        message = self._message
        assert message is not None
        message.texts.append(text)
        if logprobs is not None:
            message.logprobs = message.logprobs or []
            message.logprobs.extend(logprobs)
        shown = {"delta": text, "logprobs": logprobs or []}
        yield self.event("response.output_text.delta", **message.at, **shown)

    def _open_message(self) -> Iterator[Event]:
        message = self._message = _Message(len(self._output))
        opened = message_item(message.id, [], "in_progress")
        self._output.append(opened)
        yield self.event("response.output_item.added", output_index=message.place, item=opened)
        yield self.event("response.content_part.added", **message.at, part=text_part(""))

    def _close_message(self, status: str) -> Iterator[Event]:
        message, self._message = self._message, None
        if message is None:
            return
        self._output[message.place] = done = message.item(status)
        shown = {"text": "".join(message.texts), "logprobs": message.logprobs or []}
        yield self.event("response.output_text.done", **message.at, **shown)
        yield self.event("response.content_part.done", **message.at, part=done["content"][0])
        yield self.event("response.output_item.done", output_index=message.place, item=done)

    def _add_call(self, delta: Mapping[str, Any]) -> Iterator[Event]:
        made = delta.get("function") or {}
        call = self._calls.get(delta["index"])
        if call is None:
            call = _Call(len(self._output), delta.get("id") or new_id("call"), made["name"])
            self._calls[delta["index"]] = call
            opened = call.item("in_progress")
            self._output.append(opened)
            yield self.event("response.output_item.added", output_index=call.place, item=opened)
        if arguments := made.get("arguments"):
            call.arguments.append(arguments)
            yield self.event(
                "response.function_call_arguments.delta",
                item_id=call.id,
                output_index=call.place,
                delta=arguments,
            )


class _Message:
    """A message that is being written."""

    def __init__(self, place: int) -> None:
        self.id = new_id("msg")
        self.place = place
        self.texts: list[str] = []
        self.logprobs: list[Item] | None = None
        self.at = {"item_id": self.id, "output_index": place, "content_index": 0}

    def item(self, status: str) -> Item:
        return message_item(self.id, [text_part("".join(self.texts), self.logprobs)], status)


class _Call:
    """A call that is being written."""

    def __init__(self, place: int, call_id: str, name: str) -> None:
        self.id = new_id("fc")
        self.place = place
        self.call_id = call_id
        self.name = name
        self.arguments: list[str] = []

    def item(self, status: str) -> Item:
        return call_item(self.id, self.call_id, self.name, "".join(self.arguments), status)
