"""The chat behind a response: what came before it, and how it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from deepseek.serve.api.errors import ApiError
from deepseek.serve.api.store_errors import stores_errors
from deepseek.serve.responses.chat import chat_body
from deepseek.serve.responses.items import Item, chat_messages, without_oldest_turn
from deepseek.serve.responses.request import ResponseRequest
from deepseek.serve.state.responses import ResponseStore

T = TypeVar("T")
Answer = Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]
Chat = Callable[[Any, dict[str, Any]], Awaitable[Answer]]
"""Answers the body of POST /v1/chat/completions for whom `current_tenant` gives: a completion, or
where the body says `stream`, its chunks. Refuses by an ApiError before the first chunk."""

_TOO_LONG = "context_length_exceeded"


async def conversation(
    store: ResponseStore, tenant: str, previous: str | None, items: Sequence[Item]
) -> list[Item]:
    """Return the messages of a conversation: those up to a response, and what is new.

    Raises:
        ApiError: the response is not there, or cannot be continued.
    """
    with stores_errors():
        history: list[Item] = []
        if previous is not None:
            history = await asyncio.to_thread(store.history, tenant, previous)
        return chat_messages([*history, *items])


async def ask(
    chat: Callable[[Any, dict[str, Any]], Awaitable[T]],
    tenant: Any,
    body: ResponseRequest,
    messages: Sequence[Item],
    **fields: Any,
) -> T:
    """Return what a chat says to the body of a response. With `truncation: auto` a conversation
    that is too long loses its oldest turns until it fits.

    Args:
        chat: gets the body of a chat.
        tenant: whose.
        body: of the response.
        messages: from `conversation`.
        fields: what the chat's body holds beside.
    """
    while True:
        try:
            return await chat(tenant, chat_body(body, messages) | fields)
        except ApiError as error:
            shorter = without_oldest_turn(messages)
            if error.code != _TOO_LONG or body.truncation != "auto" or shorter is None:
                raise
            messages = shorter
