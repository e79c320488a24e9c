"""POST /v1/completions."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request, Response

from deepseek.serve.api.context import request_id_of, tenant_of
from deepseek.serve.api.errors import bad_request
from deepseek.serve.api.grammars import answer_grammar
from deepseek.serve.api.jobs import Job
from deepseek.serve.api.reading import Reader
from deepseek.serve.api.schema.answers import Completion
from deepseek.serve.api.schema.completion import CompletionBody
from deepseek.serve.api.service import STREAM_RESPONSE, Service, whole
from deepseek.serve.api.sse import EventStream
from deepseek.serve.api.strict_json import StrictRoute
from deepseek.serve.api.text_answers import TextForm, completion, completion_chunks

MAX_ANSWERS = 64
"""Most answers of one request, over all its prompts."""


def completions_router(service: Service) -> APIRouter:
    """Return the router of completions."""
    router = APIRouter(route_class=StrictRoute, tags=["completions"])

    @router.post("/v1/completions", response_model=Completion, responses={200: STREAM_RESPONSE})
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue one or more texts, whole or as a stream."""
        _check(body)
        service.reader.adapter(body.model)
        prompts = await _prompts(service.reader, body)
        job = _job(service, body, prompts, request)
        form = TextForm(
            service.generator.tokenizer,
            echoes=await _echoes(service.reader, body, prompts),
            has_answer=body.max_tokens != 0,
            texts=None if body.logprobs is None else service.texts,
        )
        outputs = await service.begin(request, job)
        if not body.stream:
            return await whole(request, outputs, completion(job, outputs, form))
        has_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = completion_chunks(job, outputs, form, has_usage=has_usage)
        return EventStream(chunks, outputs, service.settings, job.request_id)

    return router


def _check(body: CompletionBody) -> None:
    count = body.n or 1
    if body.best_of is not None and body.best_of != count:
        raise bad_request("best_of must equal n: every answer is given back.", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens may be 0 only with echo.", "max_tokens")
    prompts = body.prompt if _is_list_of_prompts(body.prompt) else [body.prompt]
    if len(prompts) * count > MAX_ANSWERS:
        text = f"A request may have {MAX_ANSWERS} answers; prompts times n is more."
        raise bad_request(text, "n")


async def _prompts(reader: Reader, body: CompletionBody) -> list[list[int]]:
    """Return the prompts as token ids."""
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        texts = [prompt] if isinstance(prompt, str) else cast("list[str]", prompt)
        has_begin = body.add_special_tokens is not False
        return await reader.prompts.of_text(texts, add_special_tokens=has_begin)
    listed = prompt if isinstance(prompt[0], list) else [prompt]
    prompts = cast("list[list[int]]", listed)
    for ids in prompts:
        reader.check_ids(ids, "prompt")
    return prompts


async def _echoes(
    reader: Reader, body: CompletionBody, prompts: list[list[int]]
) -> list[str] | None:
    """Return the texts that stand before the answers."""
    if not body.echo:
        return None
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], str):
        return cast("list[str]", body.prompt)
    return [await reader.prompts.text_of(ids) for ids in prompts]


def _job(service: Service, body: CompletionBody, prompts: list[list[int]], request: Request) -> Job:
    tenant = tenant_of(request.scope)
    requests = service.reader.requests(
        body,
        prompts,
        max_tokens=body.max_tokens,
        tenant=tenant.id,
        grammar=answer_grammar(body),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return Job(
        route="completions",
        request_id=request_id_of(request.scope),
        tenant=tenant,
        model=body.model or service.settings.model,
        requests=requests,
        num_choices=body.n or 1,
    )


def _is_list_of_prompts(prompt: object) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], str | list)
