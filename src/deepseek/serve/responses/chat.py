"""The chat request that a request to /v1/responses stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepseek.serve.responses.items import Item
from deepseek.serve.responses.request import FunctionChoice, ResponseRequest, SchemaFormat


def chat_body(request: ResponseRequest, messages: Sequence[Item]) -> dict[str, Any]:
    """Return the body of POST /v1/chat/completions.

    Args:
        request: what was asked; its instructions go first and are not part of the history.
        messages: the conversation, from `items.chat_messages`.
    """
    head = [{"role": "system", "content": request.instructions}] if request.instructions else []
    body: dict[str, Any] = {"model": request.model, "messages": [*head, *messages]}
    plain = {
        "max_completion_tokens": request.max_output_tokens,
        "metadata": request.metadata,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "user": request.user,
        "response_format": _response_format(request),
    }
    body |= {name: value for name, value in plain.items() if value is not None}
    body |= _tools(request)
    if request.wants_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _tools(request: ResponseRequest) -> dict[str, Any]:
    if not request.tools:
        return {}
    made = [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in request.tools
    ]
    body: dict[str, Any] = {"tools": made}
    if isinstance(request.tool_choice, FunctionChoice):
        function = {"name": request.tool_choice.name}
        body["tool_choice"] = {"type": "function", "function": function}
    elif request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    if request.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls
    return body


def _response_format(request: ResponseRequest) -> dict[str, Any] | None:
    wanted = request.text.format if request.text else None
    if wanted is None or wanted.type == "text":
        return None
    if isinstance(wanted, SchemaFormat):
        schema = wanted.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": "json_schema", "json_schema": schema}
    return {"type": wanted.type}
