"""The answers of /v1/completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from deepseek.data import Tokenizer
from deepseek.serve.api.jobs import Job, Outputs
from deepseek.serve.api.logprobs import CompletionTokens, TokenTexts
from deepseek.serve.api.schema.answers import Completion, CompletionChoice, CompletionLogprobs
from deepseek.serve.api.usage import UsageCount
from deepseek.serve.generation import Output


class TextForm:
    """How texts are given back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        echoes: Sequence[str] | None,
        has_answer: bool,
        texts: TokenTexts | None,
    ) -> None:
        """Give texts back in one form.

        Args:
            tokenizer: the model's.
            echoes: the prompts' texts, to stand before the answers; None for none.
            has_answer: False where only the prompt is wanted.
            texts: where logprobs are wanted.
        """
        self.tokenizer = tokenizer
        self.echoes = echoes
        self.has_answer = has_answer
        self.texts = texts


class _Choice:
    """One text while it comes."""

    def __init__(self, form: TextForm, echo: str | None) -> None:
        self._has_answer = form.has_answer
        self._echo = echo
        self._is_first = True
        self._tokens = None if form.texts is None else CompletionTokens(form.texts, form.tokenizer)

    def take(self, output: Output) -> tuple[str, CompletionLogprobs | None]:
        """Return what an output adds to text and logprobs."""
        is_first, self._is_first = self._is_first, False
        text = output.text if self._has_answer else ""
        tokens = output.tokens if self._has_answer else ()
        if is_first and self._echo is not None:
            text = self._echo + text
            tokens = (*(output.prompt_logprobs or ()), *tokens)
        logprobs = self._tokens.push(tokens) if self._tokens else None
        return text, logprobs

    def finish(self, output: Output) -> dict[str, Any]:
        """Return the fields that say why a text has ended."""
        if not self._has_answer:
            return {"finish_reason": "length", "stop_reason": None}
        if output.finish_reason == "repetition":
            return {"finish_reason": "length", "stop_reason": "repetition"}
        return {"finish_reason": output.finish_reason, "stop_reason": output.stopped_by}


async def completion(job: Job, outputs: Outputs, form: TextForm) -> Completion:
    """Return the whole answer."""
    usage = UsageCount(job, counts_answers=form.has_answer)
    choices = _choices(job, form)
    texts: list[list[str]] = [[] for _ in choices]
    logprobs = [_no_tokens() for _ in choices]
    ends: list[dict[str, Any]] = [{} for _ in choices]
    async for number, output in outputs:
        usage.take(number, output)
        text, more = choices[number].take(output)
        texts[number].append(text)
        if more is not None:
            _extend(logprobs[number], more)
        if output.finish_reason:
            ends[number] = choices[number].finish(output)
    return Completion(
        id=completion_id(job),
        created=job.created,
        model=job.model,
        choices=[
            CompletionChoice(
                index=number,
                text="".join(texts[number]),
                logprobs=None if form.texts is None else logprobs[number],
                **ends[number],
            )
            for number in range(len(choices))
        ],
        usage=usage.usage(),
    )


async def completion_chunks(
    job: Job, outputs: Outputs, form: TextForm, *, has_usage: bool
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the answer in OpenAI's chunks."""
    usage = UsageCount(job, counts_answers=form.has_answer)
    choices = _choices(job, form)
    head: dict[str, Any] = {
        "id": completion_id(job),
        "object": "text_completion",
        "created": job.created,
        "model": job.model,
        "system_fingerprint": None,
    }
    if has_usage:
        head["usage"] = None
    async for number, output in outputs:
        usage.take(number, output)
        text, logprobs = choices[number].take(output)
        shown = None if logprobs is None else logprobs.model_dump()
        part = {"index": number, "text": text, "logprobs": shown, "finish_reason": None}
        if output.finish_reason:
            yield {**head, "choices": [{**part, **choices[number].finish(output)}]}
        elif text or (logprobs is not None and logprobs.tokens):
            yield {**head, "choices": [part]}
    if has_usage:
        yield {**head, "choices": [], "usage": usage.usage().model_dump()}


def completion_id(job: Job) -> str:
    """Return the id of an answer."""
    return f"cmpl-{job.request_id.removeprefix('req-')}"


def _choices(job: Job, form: TextForm) -> list[_Choice]:
    return [
        _Choice(form, form.echoes[number // job.num_choices] if form.echoes is not None else None)
        for number in range(len(job.requests))
    ]


def _no_tokens() -> CompletionLogprobs:
    return CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])


def _extend(logprobs: CompletionLogprobs, more: CompletionLogprobs) -> None:
    logprobs.text_offset += more.text_offset
    logprobs.token_logprobs += more.token_logprobs
    logprobs.tokens += more.tokens
    logprobs.top_logprobs += more.top_logprobs
