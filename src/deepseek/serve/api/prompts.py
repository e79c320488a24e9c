"""From messages and texts to token ids, away from the event loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.to_thread

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError
from deepseek.serve.api.errors import ApiError, bad_request
from deepseek.serve.api.schema.chat import (
    AssistantMessage,
    CalledTool,
    Content,
    Message,
    SystemMessage,
    TemplateOptions,
    ToolMessage,
)
from deepseek.serve.api.tool_calls import CLOSING, OPENING
from deepseek.serve.api.tools import instructions

MAX_THREADS = 2
"""Prompts that are made ready at once; more wait."""


class Prompts:
    """Makes prompts ready with the model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        """Take prompts of less than `context` tokens."""
        self._tokenizer = tokenizer
        self._context = context
        self._threads: anyio.CapacityLimiter | None = None

    async def of_text(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of texts."""
        return await self._run(self._encode, list(texts), add_special_tokens)

    async def of_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        options: TemplateOptions | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the token ids of a conversation.

        Raises:
            ApiError: 400: the messages cannot be rendered.
        """
        given = {} if options is None else options.model_dump(exclude_none=True)
        return await self._run(self._render, messages, tools, given, add_generation_prompt)

    async def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens written out."""
        return await self._run(lambda: self._tokenizer.decode(ids, skip_special_tokens=False))

    def check(self, prompt: Sequence[int], max_tokens: int = 1, param: str = "prompt") -> None:
        """Refuse a prompt that is empty, or that with its answer is longer than the context.

        Args:
            prompt: token ids.
            max_tokens: of the answer.
            param: the field that the prompt came from.

        Raises:
            ApiError: 400.
        """
        if not prompt:
            raise bad_request("The prompt is empty.", param)
        if len(prompt) + max_tokens > self._context:
            text = f"This model's context is {self._context} tokens; the prompt has {len(prompt)}"
            raise bad_request(
                f"{text} and the answer needs {max_tokens}.", param, "context_length_exceeded"
            )

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        options: dict[str, Any],
        add_generation_prompt: bool,
    ) -> list[int]:
        takes_tools = self._tokenizer.chat_template_takes("tools")
        plain = [_plain(message, takes_tools) for message in messages]
        if tools and not takes_tools:
            plain = _with_instructions(plain, instructions(tools))
        text = self._tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=add_generation_prompt,
            tools=tools if takes_tools else None,
            options=options,
        )
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        if self._threads is None:
            self._threads = anyio.CapacityLimiter(MAX_THREADS)
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self._threads)
        except ConfigError as error:
            raise _prompt_error(error) from error


def _prompt_error(error: ConfigError) -> ApiError:
    return bad_request(str(error), "messages", "invalid_value")


def _plain(message: Message, takes_tools: bool) -> dict[str, Any]:
    """Return a message as chat templates know it."""
    if isinstance(message, SystemMessage):
        return {"role": "system", "content": _text(message.content)}
    if isinstance(message, AssistantMessage):
        return _plain_assistant(message, takes_tools)
    if isinstance(message, ToolMessage):
        text = _text(message.content)
        if takes_tools:
            return {"role": "tool", "content": text, "tool_call_id": message.tool_call_id}
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    return {"role": "user", "content": _text(message.content)}


def _plain_assistant(message: AssistantMessage, takes_tools: bool) -> dict[str, Any]:
    text = "" if message.content is None else _text(message.content)
    calls = [_plain_call(call) for call in message.tool_calls or ()]
    if not calls:
        return {"role": "assistant", "content": text}
    if takes_tools:
        wrapped = [{"id": call.id, "type": "function"} for call in message.tool_calls or ()]
        functions = [{**rest, "function": call} for rest, call in zip(wrapped, calls, strict=True)]
        return {"role": "assistant", "content": text, "tool_calls": functions}
    written = (f"{OPENING}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSING}" for call in calls)
    return {"role": "assistant", "content": "\n".join([*([text] if text else []), *written])}


def _plain_call(call: CalledTool) -> dict[str, Any]:
    """Return a call with its arguments as an object, which is what templates write out."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        text = "The arguments of a function that was called must be a JSON object."
        raise bad_request(text, "messages")
    return {"name": call.function.name, "arguments": arguments}


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _with_instructions(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the messages with `text` in the system message, which is added where there is none."""
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
