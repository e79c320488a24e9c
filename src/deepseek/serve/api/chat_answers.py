"""The answers of a chat, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

from deepseek.serve.api.jobs import Job, Outputs
from deepseek.serve.api.logprobs import TokenTexts, chat_logprobs
from deepseek.serve.api.schema.answers import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatFinish,
    ChatLogprobs,
    FunctionCall,
    TokenLogprob,
    ToolCall,
)
from deepseek.serve.api.tool_calls import Call, Piece
from deepseek.serve.api.tools import ToolPlan
from deepseek.serve.api.usage import UsageCount
from deepseek.serve.generation import Output


class _Choice:
    """One answer while it comes: its text split into content and calls."""

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._parser = plan.parser()
        self.num_calls = 0

    def take(self, output: Output) -> list[Piece]:
        """Return the pieces that an output settles."""
        if self._parser is None:
            return [output.text] if output.text else []
        pieces = self._parser.push(output.text)
        return pieces + self._parser.flush() if output.finish_reason else pieces

    def finish(self, output: Output) -> tuple[ChatFinish, str | int | None]:
        """Return OpenAI's reason for the end, and what more is known of it.

        A call that was asked for by name ends with `stop`, as OpenAI has it; an answer that went in
        circles with `length`, because it was cut.
        """
        if output.finish_reason == "repetition":
            return "length", "repetition"
        if output.finish_reason == "length":
            return "length", None
        is_call = self.num_calls and self._plan.mode != "named"
        return ("tool_calls" if is_call else "stop"), output.stopped_by


async def chat_completion(
    job: Job, outputs: Outputs, plan: ToolPlan, texts: TokenTexts | None
) -> ChatCompletion:
    """Return the whole answer.

    Args:
        job: what was asked.
        outputs: of its answers.
        plan: how its tools are used.
        texts: where logprobs are wanted.
    """
    usage = UsageCount(job)
    choices = [_Choice(plan) for _ in job.requests]
    pieces: list[list[Piece]] = [[] for _ in choices]
    tokens: list[list[TokenLogprob]] = [[] for _ in choices]
    ends: dict[int, Output] = {}
    async for number, output in outputs:
        usage.take(number, output)
        pieces[number] += choices[number].take(output)
        choices[number].num_calls = sum(isinstance(piece, Call) for piece in pieces[number])
        if texts is not None:
            tokens[number] += chat_logprobs(texts, output.tokens)
        if output.finish_reason:
            ends[number] = output
    answers: list[ChatChoice] = []
    for number, choice in enumerate(choices):
        reason, stop_reason = choice.finish(ends[number])
        answers.append(
            ChatChoice(
                index=number,
                message=_message(pieces[number]),
                logprobs=None if texts is None else ChatLogprobs(content=tokens[number]),
                finish_reason=reason,
                stop_reason=stop_reason,
            )
        )
    return ChatCompletion(
        id=chat_id(job),
        created=job.created,
        model=job.model,
        choices=answers,
        usage=usage.usage(),
    )


async def chat_chunks(
    job: Job, outputs: Outputs, plan: ToolPlan, texts: TokenTexts | None, *, has_usage: bool
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the answer in OpenAI's chunks; arguments as in `chat_completion`."""
    usage = UsageCount(job)
    choices = [_Choice(plan) for _ in job.requests]
    head: dict[str, Any] = {
        "id": chat_id(job),
        "object": "chat.completion.chunk",
        "created": job.created,
        "model": job.model,
        "system_fingerprint": None,
    }
    if has_usage:
        head["usage"] = None
    for number in range(len(choices)):
        delta = {"role": "assistant", "content": "", "refusal": None}
        yield {**head, "choices": [_delta(number, delta)]}
    async for number, output in outputs:
        usage.take(number, output)
        for part in _parts(number, choices[number], output, texts):
            yield {**head, "choices": [part]}
    if has_usage:
        yield {**head, "choices": [], "usage": usage.usage().model_dump()}


def chat_id(job: Job) -> str:
    """Return the id of a chat's answer."""
    return f"chatcmpl-{job.request_id.removeprefix('req-')}"


def _parts(
    number: int, choice: _Choice, output: Output, texts: TokenTexts | None
) -> Iterator[dict[str, Any]]:
    """Yield the choices' parts of the chunks that an output becomes."""
    deltas: list[dict[str, Any]] = []
    for piece in choice.take(output):
        if isinstance(piece, Call):
            deltas += _call_deltas(choice.num_calls, piece)
            choice.num_calls += 1
        else:
            deltas.append({"content": piece})
    logprobs = None
    if texts is not None and output.tokens:
        logprobs = ChatLogprobs(content=chat_logprobs(texts, output.tokens)).model_dump()
        deltas = deltas or [{"content": ""}]
    for place, delta in enumerate(deltas):
        yield _delta(number, delta, logprobs if place == 0 else None)
    if output.finish_reason:
        reason, stop_reason = choice.finish(output)
        end = {"finish_reason": reason, "stop_reason": stop_reason}
        yield {**_delta(number, {}), **end}


def _delta(number: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _call_deltas(index: int, call: Call) -> list[dict[str, Any]]:
    function = {"name": call.name, "arguments": ""}
    begin = {"index": index, "id": call.id, "type": "function", "function": function}
    rest = {"index": index, "function": {"arguments": call.arguments}}
    return [{"tool_calls": [begin]}, {"tool_calls": [rest]}]


def _message(pieces: list[Piece]) -> AnswerMessage:
    calls = [piece for piece in pieces if isinstance(piece, Call)]
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    if not calls:
        return AnswerMessage(content=text)
    made = [
        ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in calls
    ]
    return AnswerMessage(content=text or None, tool_calls=made)
