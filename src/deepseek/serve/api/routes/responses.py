"""/v1/responses, on top of the chat."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from deepseek.errors import DeepseekError
from deepseek.serve.api.errors import ApiError
from deepseek.serve.api.paging import Identified, page
from deepseek.serve.api.store_errors import stores_errors
from deepseek.serve.responses.answer import answered, begun
from deepseek.serve.responses.chat import chat_body
from deepseek.serve.responses.events import response_events
from deepseek.serve.responses.items import (
    Item,
    chat_messages,
    input_items,
    without_oldest_turn,
)
from deepseek.serve.responses.request import ResponseRequest
from deepseek.serve.state.responses import ResponseStore

Answer = Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]
Chat = Callable[[Any, dict[str, Any]], Awaitable[Answer]]
"""Answers the body of POST /v1/chat/completions for whom `current_tenant` gives: a completion, or
where the body says `stream`, its chunks. Refuses by an ApiError before the first chunk."""

_LOG = logging.getLogger(__name__)
_TOO_LONG = "context_length_exceeded"
_SEND_TIMEOUT_S = 30


def responses_router(
    store: ResponseStore, chat: Chat, current_tenant: Callable[..., Any]
) -> APIRouter:
    """Return the routes of responses.

    Args:
        store: keeps them.
        chat: answers.
        current_tenant: a FastAPI dependency that gives whoever asks; its `id` is the tenant.
    """
    router = APIRouter(prefix="/v1/responses", tags=["responses"])
    whoever = Depends(current_tenant)

    @router.post("", response_model=None)
    async def create_response(body: ResponseRequest, tenant: Identified = whoever) -> Response:
        """Answer, as one object or as a stream of events."""
        items = input_items(body)
        with stores_errors():
            history = await _history(store, tenant.id, body.previous_response_id)
            messages = chat_messages([*history, *items])
        response = begun(body)

        async def save(final: dict[str, Any]) -> dict[str, Any]:
            if not body.is_stored:
                return final
            try:
                await asyncio.to_thread(store.put, tenant.id, final, items)
            except DeepseekError as error:
                # The answer is there and is paid for; that it was not kept is said in it.
                _LOG.error("response %s is not kept: %s", final["id"], error)
                return {**final, "store": False}
            return final

        answer = await _ask(chat, tenant, body, messages)
        if isinstance(answer, Mapping):
            return JSONResponse(await save(answered(response, answer)))
        events = _encoded(response_events(response, answer, save))
        return EventSourceResponse(events, send_timeout=_SEND_TIMEOUT_S)

    @router.get("/{response_id}")
    def get_response(
        response_id: str,
        tenant: Identified = whoever,
        stream: bool = False,
    ) -> dict[str, Any]:
        """Give a kept response."""
        if stream:
            raise ApiError(400, "A kept response cannot be streamed again.", param="stream")
        with stores_errors():
            return store.get(tenant.id, response_id).response

    @router.delete("/{response_id}")
    def delete_response(response_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Remove a response."""
        with stores_errors():
            store.delete(tenant.id, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @router.post("/{response_id}/cancel")
    def cancel_response(response_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Refuse: only responses in the background can be cancelled, and there are none."""
        with stores_errors():
            store.get(tenant.id, response_id)
        raise ApiError(400, "Cannot cancel a synchronous response.", param="response_id")

    @router.get("/{response_id}/input_items")
    def list_input_items(
        response_id: str,
        tenant: Identified = whoever,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        """Give a page of what a response answered."""
        with stores_errors():
            items = store.get(tenant.id, response_id).input_items
        return page(*_paged(items if order == "asc" else items[::-1], after, limit))

    return router


async def _history(store: ResponseStore, tenant: str, previous: str | None) -> list[Item]:
    if previous is None:
        return []
    return await asyncio.to_thread(store.history, tenant, previous)


async def _ask(
    chat: Chat, tenant: Identified, body: ResponseRequest, messages: Sequence[Item]
) -> Answer:
    """Return the chat's answer. With `truncation: auto` a conversation that is too long loses its
    oldest turns until it fits."""
    while True:
        try:
            return await chat(tenant, chat_body(body, messages))
        except ApiError as error:
            shorter = without_oldest_turn(messages)
            if error.code != _TOO_LONG or body.truncation != "auto" or shorter is None:
                raise
            messages = shorter


async def _encoded(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[ServerSentEvent]:
    async for event in events:
        yield ServerSentEvent(data=json.dumps(event), event=event["type"], sep="\n")


def _paged(items: list[Item], after: str | None, limit: int) -> tuple[list[Item], bool]:
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ApiError(404, "No such item.", param="after", code="not_found")
        items = items[places[0] + 1 :]
    return items[:limit], len(items) > limit
