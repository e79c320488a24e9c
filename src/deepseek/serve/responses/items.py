"""Items of a conversation in the one form they are kept in, and as the messages of a chat."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek.serve.responses.request import (
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    MessageItem,
    Part,
    ReasoningItem,
    RefusalPart,
    ResponseRequest,
)
from deepseek.serve.state.errors import RequestError

Item = dict[str, Any]


def new_id(kind: str) -> str:
    """Return a fresh id: `msg` for messages, `fc` for calls, `fco` for their outputs, `resp`."""
    return f"{kind}_{secrets.token_hex(16)}"


def input_items(request: ResponseRequest) -> list[Item]:
    """Return what is new in a request, each item with an id of ours."""
    if isinstance(request.input, str):
        return [_message(MessageItem(role="user", content=request.input))]
    return [_kept(item) for item in request.input if not isinstance(item, ReasoningItem)]


def chat_messages(items: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Return the messages of a conversation, oldest first.

    Raises:
        RequestError: an output belongs to a call that nobody made.
    """
    messages: list[Item] = []
    called: set[str] = set()
    for item in items:
        if item["type"] == "message":
            messages.append({"role": _role(item["role"]), "content": _text(item["content"])})
        elif item["type"] == "function_call":
            called.add(item["call_id"])
            _add_call(messages, item)
        else:
            if item["call_id"] not in called:
                must = "that of a function call before it"
                raise RequestError("call_id", "a function_call_output", must, item["call_id"])
            message = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            messages.append(message)
    return messages


def without_oldest_turn(messages: Sequence[Item]) -> list[Item] | None:
    """Return a conversation without its first turn, from a user's message to before the next; None
    where only one is left. What the system says stays."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if len(turns) < 2:
        return None
    head = [message for message in messages[: turns[1]] if message["role"] == "system"]
    return [*head, *messages[turns[1] :]]


def _kept(item: InputItem) -> Item:
    if isinstance(item, MessageItem):
        return _message(item)
    if isinstance(item, FunctionCallItem):
        return {
            "type": "function_call",
            "id": new_id("fc"),
            "call_id": item.call_id,
            "name": item.name,
            "arguments": item.arguments,
            "status": "completed",
        }
    assert isinstance(item, FunctionOutputItem)
    output = item.output if isinstance(item.output, str) else _joined(item.output)
    return {
        "type": "function_call_output",
        "id": new_id("fco"),
        "call_id": item.call_id,
        "output": output,
        "status": "completed",
    }


def _message(item: MessageItem) -> Item:
    text = item.content if isinstance(item.content, str) else _joined(item.content)
    if item.role == "assistant":
        part: Item = {"type": "output_text", "text": text, "annotations": []}
    else:
        part = {"type": "input_text", "text": text}
    return {
        "type": "message",
        "id": new_id("msg"),
        "role": item.role,
        "status": "completed",
        "content": [part],
    }


def _joined(parts: Iterable[Part]) -> str:
    return "".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in parts)


def _text(content: Iterable[Mapping[str, Any]]) -> str:
    return "".join(part.get("text", part.get("refusal", "")) for part in content)


def _role(role: str) -> str:
    """Return the role that chat templates of small models know."""
    return "system" if role == "developer" else role


def _add_call(messages: list[Item], item: Mapping[str, Any]) -> None:
    """Put a call into the message of the assistant that it belongs to: calls that follow each other
    are one message's."""
    call = {
        "id": item["call_id"],
        "type": "function",
        "function": {"name": item["name"], "arguments": item["arguments"]},
    }
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
