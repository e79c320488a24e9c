"""/v1/responses, on top of the chat."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from deepseek.errors import DeepseekError
from deepseek.serve.api.background import Background
from deepseek.serve.api.conversation import Chat, ask, conversation
from deepseek.serve.api.errors import ApiError, bad_request
from deepseek.serve.api.paging import Identified, page
from deepseek.serve.api.store_errors import stores_errors
from deepseek.serve.responses.answer import answered, begun
from deepseek.serve.responses.events import response_events
from deepseek.serve.responses.items import Item, input_items
from deepseek.serve.responses.request import ResponseRequest
from deepseek.serve.state.responses import ResponseStore

_LOG = logging.getLogger(__name__)
_SEND_TIMEOUT_S = 30


def responses_router(
    store: ResponseStore,
    chat: Chat,
    current_tenant: Callable[..., Any],
    background: Background | None = None,
) -> APIRouter:
    """Return the routes of responses.

    Args:
        store: keeps them.
        chat: answers.
        current_tenant: a FastAPI dependency that gives whoever asks; its `id` is the tenant.
        background: answers those that nobody waits for; None where there are none.
    """
    router = APIRouter(prefix="/v1/responses", tags=["responses"])
    whoever = Depends(current_tenant)

    @router.post("", response_model=None)
    async def create_response(body: ResponseRequest, tenant: Identified = whoever) -> Response:
        """Answer, as one object or as a stream of events; or in the background."""
        items = input_items(body)
        messages = await conversation(store, tenant.id, body.previous_response_id, items)
        response = begun(body)
        if body.background:
            if background is None:
                raise bad_request("background is not possible in a batch.", "background")
            await background.enter(tenant, body, response, items, messages)
            return (
                _stream(background.follow(response["id"]))
                if body.stream
                else JSONResponse(response)
            )

        async def save(final: dict[str, Any]) -> dict[str, Any]:
            return await _kept(store, tenant.id, final, items) if body.is_stored else final

        answer = await ask(chat, tenant, body, messages)
        if isinstance(answer, Mapping):
            return JSONResponse(await save(answered(response, answer)))
        return _stream(response_events(response, answer, save))

    _add_kept(router, store, background, whoever)
    return router


def _add_kept(
    router: APIRouter, store: ResponseStore, background: Background | None, whoever: Any
) -> None:
    """Add the routes of responses that are kept."""

    @router.get("/{response_id}", response_model=None)
    async def get_response(
        response_id: str,
        tenant: Identified = whoever,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=0, le=2**31 - 1)] | None = None,
    ) -> Response:
        """Give a kept response; or the events of one in the background, behind a number."""
        with stores_errors():
            found = await asyncio.to_thread(store.get, tenant.id, response_id)
        if not stream:
            return JSONResponse(found.response)
        if background is None or not found.response.get("background"):
            raise bad_request("A response that was waited for cannot be streamed again.", "stream")
        after = -1 if starting_after is None else starting_after
        return _stream(background.follow(response_id, after))

    @router.delete("/{response_id}")
    async def delete_response(response_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Remove a response; one in the background is given up."""
        with stores_errors():
            await asyncio.to_thread(store.delete, tenant.id, response_id)
        if background is not None:
            await background.drop(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @router.post("/{response_id}/cancel")
    async def cancel_response(response_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Cancel a response in the background; one that has ended stays as it is."""
        if background is not None:
            return await background.cancel(tenant.id, response_id)
        with stores_errors():
            await asyncio.to_thread(store.get, tenant.id, response_id)
        raise bad_request("Cannot cancel a synchronous response.", "response_id")

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


async def _kept(
    store: ResponseStore, tenant: str, final: dict[str, Any], items: Sequence[Item]
) -> dict[str, Any]:
    """Keep a response and return it as it is shown."""
    try:
        await asyncio.to_thread(store.put, tenant, final, items)
    except DeepseekError as error:
        # The answer is there and is paid for; that it was not kept is said in it.
        _LOG.error("response %s is not kept: %s", final["id"], error)
        return {**final, "store": False}
    return final


def _stream(events: AsyncIterator[Mapping[str, Any]]) -> Response:
    return EventSourceResponse(_encoded(events), send_timeout=_SEND_TIMEOUT_S)


async def _encoded(events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[ServerSentEvent]:
    async for event in events:
        yield ServerSentEvent(data=json.dumps(event), event=event["type"], sep="\n")


def _paged(items: list[Item], after: str | None, limit: int) -> tuple[list[Item], bool]:
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ApiError(404, "No such item.", param="after", code="not_found")
        items = items[places[0] + 1 :]
    return items[:limit], len(items) > limit
