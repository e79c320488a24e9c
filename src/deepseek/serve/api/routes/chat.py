"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from deepseek.serve.api.chat_answers import chat_chunks, chat_completion
from deepseek.serve.api.context import request_id_of, tenant_of
from deepseek.serve.api.errors import bad_request
from deepseek.serve.api.jobs import Job
from deepseek.serve.api.schema.answers import ChatCompletion
from deepseek.serve.api.schema.chat import ChatBody
from deepseek.serve.api.service import STREAM_RESPONSE, Service, whole
from deepseek.serve.api.sse import EventStream
from deepseek.serve.api.strict_json import StrictRoute
from deepseek.serve.api.tenants import Tenant
from deepseek.serve.api.tools import ToolPlan, plan_tools


def chat_router(service: Service) -> APIRouter:
    """Return the router of chats."""
    router = APIRouter(route_class=StrictRoute, tags=["chat"])

    @router.post(
        "/v1/chat/completions", response_model=ChatCompletion, responses={200: STREAM_RESPONSE}
    )
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        plan = plan_tools(body)
        job = await chat_job(
            service, body, plan, tenant_of(request.scope), request_id_of(request.scope)
        )
        texts = service.texts if body.logprobs else None
        outputs = await service.begin(request, job)
        if not body.stream:
            return await whole(request, outputs, chat_completion(job, outputs, plan, texts))
        has_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = chat_chunks(job, outputs, plan, texts, has_usage=has_usage)
        return EventStream(chunks, outputs, service.settings, job.request_id)

    return router


async def chat_job(
    service: Service, body: ChatBody, plan: ToolPlan, tenant: Tenant, request_id: str
) -> Job:
    """Return what a chat asks of the engine.

    Raises:
        ApiError: 400 or 404: it asks for what the model does not do.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    reader = service.reader
    reader.adapter(body.model)  # an unknown model is told before the prompt is made
    prompt = await reader.prompts.of_chat(body.messages, plan.shown, body.chat_template_kwargs)
    requests = reader.requests(
        body,
        [prompt],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        tenant=tenant.id,
        grammar=plan.grammar,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        param="messages",
    )
    return Job(
        route="chat",
        request_id=request_id,
        tenant=tenant,
        model=body.model or service.settings.model,
        requests=requests,
        num_choices=body.n or 1,
    )
