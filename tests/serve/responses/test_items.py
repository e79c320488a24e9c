"""Conversations of /v1/responses become messages of a chat."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepseek.serve.responses.chat import chat_body
from deepseek.serve.responses.items import chat_messages, input_items, without_oldest_turn
from deepseek.serve.responses.request import ResponseRequest
from deepseek.serve.state.errors import RequestError


def asked(**fields: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"model": "m", "input": "Hi", **fields})


def call(call_id: str, name: str = "add") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def output(call_id: str, value: Any = "3") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": value}


def messages(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return chat_messages(input_items(asked(input=list(items))))


def test_a_text_is_a_message_of_the_user() -> None:
    items = input_items(asked())
    assert items[0]["id"].startswith("msg_")
    assert chat_messages(items) == [{"role": "user", "content": "Hi"}]


def test_messages_keep_role_and_text() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    said = {"type": "output_text", "text": "c", "annotations": [], "logprobs": []}
    assert messages(
        {"role": "developer", "content": "be short"},
        {"type": "message", "role": "user", "content": parts},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [said]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ) == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "no"},
    ]  # fmt: skip


def test_calls_that_follow_each_other_are_one_message() -> None:
    made = messages(
        {"role": "user", "content": "add"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        call("1"),
        call("2", "mul"),
        output("1"),
        output("2", [{"type": "input_text", "text": "4"}]),
        call("3"),
        output("3"),
    )
    assert [message["role"] for message in made] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "tool",
    ]
    assert [one["id"] for one in made[1]["tool_calls"]] == ["1", "2"]
    assert made[1]["content"] is None
    assert made[1]["tool_calls"][1]["function"] == {"name": "mul", "arguments": "{}"}
    assert made[3] == {"role": "tool", "tool_call_id": "2", "content": "4"}


def test_an_output_without_a_call_is_refused() -> None:
    with pytest.raises(RequestError, match="call_id of a function_call_output"):
        messages({"role": "user", "content": "x"}, output("1"), call("1"))


def test_the_chat_is_asked_for_the_same() -> None:
    schema = {"type": "object", "properties": {}}
    request = asked(
        instructions="Be kind.",
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=7,
        metadata={"a": "b"},
        user="u",
        stream=True,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        parallel_tool_calls=False,
        tool_choice={"type": "function", "name": "add"},
        tools=[{"type": "function", "name": "add", "parameters": schema, "strict": True}],
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
    )
    assert chat_body(request, chat_messages(input_items(request))) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_completion_tokens": 7,
        "metadata": {"a": "b"},
        "user": "u",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "tools": [
            {"type": "function", "function": {"name": "add", "parameters": schema, "strict": True}}
        ],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": schema, "strict": True},
        },
    }


def test_nothing_is_asked_for_that_was_not_wanted() -> None:
    for more in ({}, {"text": {"format": {"type": "text"}}}, {"tools": [], "tool_choice": "none"}):
        request = asked(**more)
        assert set(chat_body(request, [])) == {"model", "messages"}
    assert chat_body(asked(text={"format": {"type": "json_object"}}), [])["response_format"] == {
        "type": "json_object"
    }


REFUSED: dict[str, dict[str, Any]] = {
    "no input": {"input": None},
    "no items": {"input": []},
    "an unknown item": {"input": [{"type": "computer_call"}]},
    "an unknown role": {"input": [{"role": "tool", "content": "x"}]},
    "an image": {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]
    },
    "too many items": {"input": [{"role": "user", "content": "x"}] * 4097},
    "an unknown field": {"n": 2},
    "a conversation": {"conversation": "conv_1"},
    "a word for background": {"background": "later"},
    "another tool": {"tools": [{"type": "web_search"}]},
    "too many tools": {"tools": [{"type": "function", "name": "f"}] * 129},
    "a bad name": {"tools": [{"type": "function", "name": "a b"}]},
    "negative tokens": {"max_output_tokens": -1},
    "no tokens": {"max_output_tokens": 0},
    "endless tokens": {"max_output_tokens": 2**40},
    "hot": {"temperature": 2.1},
    "NaN": {"temperature": float("nan")},
    "no mass": {"top_p": 0},
    "logprobs": {"top_logprobs": 21},
    "metadata": {"metadata": {f"{number}": "" for number in range(17)}},
    "long key": {"metadata": {"k" * 65: ""}},
    "long value": {"metadata": {"k": "v" * 513}},
    "truncation": {"truncation": "middle"},
    "type as a list": {"input": [{"type": ["message"], "role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused(case: str) -> None:
    with pytest.raises(ValidationError):
        asked(**REFUSED[case])


TURNS = st.lists(st.sampled_from(["user", "assistant", "system", "tool"]), max_size=12)


@given(TURNS)
def test_a_shortened_conversation_begins_with_a_user(roles: list[str]) -> None:
    said = [{"role": role, "content": f"{number}"} for number, role in enumerate(roles)]
    shorter = without_oldest_turn(said)
    if roles.count("user") < 2:
        assert shorter is None
        return
    assert shorter is not None and len(shorter) < len(said)
    assert [message for message in shorter if message["role"] == "system"] == [
        message for message in said if message["role"] == "system"
    ]
    assert shorter[-1] == said[-1]
    kept = [message["role"] for message in shorter if message["role"] != "system"]
    assert kept[0] == "user" and kept.count("user") == roles.count("user") - 1
