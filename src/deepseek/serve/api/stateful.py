"""The routes that need durable state: files, batches, responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request

from deepseek.serve.api.app import RouterMaker, create_inner_app
from deepseek.serve.api.context import tenant_of
from deepseek.serve.api.inside import InsideCaller, chat
from deepseek.serve.api.routes.batches import batches_router
from deepseek.serve.api.routes.files import files_router
from deepseek.serve.api.routes.responses import responses_router
from deepseek.serve.api.service import Service
from deepseek.serve.api.tenants import Tenant
from deepseek.serve.state.batch_runner import BatchRunner
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.files import FileStore
from deepseek.serve.state.responses import ResponseStore

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
) -> BatchRunner:
    """Add the routes of files, batches and responses; return what runs the batches.

    Args:
        app: from `create_app`.
        files, batches, responses: the stores.
        routers: further routes that lines of batches may ask for.
    """
    service: Service = app.state.service
    app.include_router(files_router(files, _tenant))
    app.include_router(batches_router(batches, _tenant))
    app.include_router(_responses(responses)(service))
    inner = create_inner_app(app, (_responses(responses), *routers))
    return BatchRunner(batches, InsideCaller(inner))


def _tenant(request: Request) -> Tenant:
    return tenant_of(request.scope)


def _responses(store: ResponseStore) -> RouterMaker:
    def make(service: Service) -> APIRouter:
        async def answer(
            tenant: Tenant, body: dict[str, Any]
        ) -> Mapping[str, Any] | AsyncGenerator[Mapping[str, Any]]:
            return await chat(service, tenant, body)

        return responses_router(store, answer, _tenant)

    return make
