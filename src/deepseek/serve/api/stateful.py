"""The routes that need durable state: files, batches, responses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request

from deepseek.serve.api.app import RouterMaker, create_inner_app
from deepseek.serve.api.background import Background
from deepseek.serve.api.context import tenant_of
from deepseek.serve.api.conversation import Answer
from deepseek.serve.api.inside import InsideCaller, admit, chat
from deepseek.serve.api.paging import Identified
from deepseek.serve.api.routes.batches import batches_router
from deepseek.serve.api.routes.files import files_router
from deepseek.serve.api.routes.responses import responses_router
from deepseek.serve.api.service import Service
from deepseek.serve.api.tenants import Tenant
from deepseek.serve.state.batch_runner import BatchRunner
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.files import FileStore
from deepseek.serve.state.responses import ResponseStore

if TYPE_CHECKING:
    from deepseek.serve.running import Worker

FRAME_BYTES = 64 * 2**10
"""Of an upload, besides its file."""


def upload_bytes(files: FileStore) -> dict[str, int]:
    """Return the paths that take files, with the most bytes of a request."""
    return {"/v1/files": files.limits.file_bytes + FRAME_BYTES}


def add_state(
    app: FastAPI,
    *,
    files: FileStore,
    batches: BatchStore,
    responses: ResponseStore,
    routers: Sequence[RouterMaker] = (),
) -> list[Worker]:
    """Add the routes of files, batches and responses; return what works beside the requests:
    batches, and responses in the background.

    Args:
        app: from `create_app`.
        files, batches, responses: the stores.
        routers: further routes that lines of batches may ask for.
    """
    service: Service = app.state.service
    app.include_router(files_router(files, _tenant))
    app.include_router(batches_router(batches, _tenant))
    background = _background(service, responses)
    app.include_router(_responses(responses, background)(service))
    inner = create_inner_app(app, (_responses(responses), *routers))
    return [BatchRunner(batches, InsideCaller(inner)), background]


def _tenant(request: Request) -> Tenant:
    return tenant_of(request.scope)


def _background(service: Service, store: ResponseStore) -> Background:
    """Return what answers responses later. They are charged when they come, so not then."""
    inner = service.without_limits()

    async def answer(tenant: Identified, body: dict[str, Any]) -> Answer:
        return await chat(inner, Tenant(id=tenant.id), body)

    return Background(store, answer, functools.partial(admit, service))


def _responses(store: ResponseStore, background: Background | None = None) -> RouterMaker:
    def make(service: Service) -> APIRouter:
        chats = functools.partial(chat, service)
        return responses_router(store, chats, _tenant, background)

    return make
