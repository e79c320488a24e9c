"""Response objects: one that is begun, and the same with what the chat answered."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek.serve.responses.items import Item, new_id
from deepseek.serve.responses.request import FunctionChoice, ResponseRequest

_CUT_OFF = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Reasons to finish a chat with an answer that is not whole, and what /v1/responses calls them."""


def begun(request: ResponseRequest, now: float | None = None) -> dict[str, Any]:
    """Return the response object of a request that is being answered."""
    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    choice = request.tool_choice or "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time() if now is None else now),
        "status": "queued" if request.background else "in_progress",
        "background": bool(request.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.is_stored,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice,
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


def answered(response: Mapping[str, Any], completion: Mapping[str, Any]) -> dict[str, Any]:
    """Return a begun response with the answer of a chat that was not streamed."""
    choice = completion["choices"][0]
    message, reason = choice["message"], choice["finish_reason"]
    output = []
    calls = message.get("tool_calls") or ()
    if message.get("content") or not calls:
        logprobs = text_logprobs(choice)
        part = text_part(message.get("content") or "", logprobs)
        output.append(message_item(new_id("msg"), [part], item_status(reason)))
    for call in calls:
        made = call["function"]
        output.append(
            call_item(new_id("fc"), call["id"], made["name"], made["arguments"], "completed")
        )
    return ended(response, output, reason, completion.get("usage"), completion.get("model"))


def ended(
    response: Mapping[str, Any],
    output: Iterable[Item],
    finish_reason: str | None,
    chat_usage: Mapping[str, Any] | None,
    model: str | None = None,
) -> dict[str, Any]:
    """Return a begun response with its output.

    Args:
        response: from `begun`.
        output: messages and calls.
        finish_reason: of the chat.
        chat_usage: of the chat.
        model: the name of who answered, where the chat says it.
    """
    cut_off = _CUT_OFF.get(finish_reason or "")
    return {
        **response,
        "status": "incomplete" if cut_off else "completed",
        "completed_at": None if cut_off else int(time.time()),
        "incomplete_details": {"reason": cut_off} if cut_off else None,
        "model": model or response["model"],
        "output": list(output),
        "usage": _usage(chat_usage),
    }


def failed(response: Mapping[str, Any], output: Iterable[Item], message: str) -> dict[str, Any]:
    """Return a begun response that could not be answered, with what there was until then."""
    error = {"code": "server_error", "message": message}
    return {**response, "status": "failed", "error": error, "output": list(output)}


def message_item(item_id: str, content: list[Item], status: str) -> Item:
    """Return a message of the assistant."""
    return {
        "type": "message",
        "id": item_id,
        "status": status,
        "role": "assistant",
        "content": content,
    }


def text_part(text: str, logprobs: list[Item] | None = None) -> Item:
    """Return the text within a message."""
    part: Item = {"type": "output_text", "text": text, "annotations": []}
    return part if logprobs is None else {**part, "logprobs": logprobs}


def call_item(item_id: str, call_id: str, name: str, arguments: str, status: str) -> Item:
    """Return a call of a function."""
    return {
        "type": "function_call",
        "id": item_id,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def item_status(finish_reason: str | None) -> str:
    """Return the status of the last message."""
    return "incomplete" if finish_reason in _CUT_OFF else "completed"


def text_logprobs(choice: Mapping[str, Any]) -> list[Item] | None:
    """Return the logprobs of a choice's text, or None where there are none."""
    found = (choice.get("logprobs") or {}).get("content")
    if found is None:
        return None
    return [
        {**_logprob(token), "top_logprobs": [_logprob(top) for top in token["top_logprobs"]]}
        for token in found
    ]


def _logprob(token: Mapping[str, Any]) -> Item:
    spelled = token.get("bytes")
    return {
        "token": token["token"],
        "bytes": list(token["token"].encode("utf-8", "replace")) if spelled is None else spelled,
        "logprob": token["logprob"],
    }


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    read, written = usage["prompt_tokens"], usage.get("completion_tokens") or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": read + written,
    }
