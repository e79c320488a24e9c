"""GET /health, /ready, /version and /metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from deepseek.serve.api.errors import not_ready
from deepseek.serve.api.schema.answers import State, Version
from deepseek.serve.api.service import Service
from deepseek.serve.api.strict_json import StrictRoute


def state_router(service: Service) -> APIRouter:
    """Return the router of the server's state."""
    router = APIRouter(route_class=StrictRoute, tags=["state"])

    @router.get("/health")
    async def health() -> State:
        """Say that the process answers."""
        return State()

    @router.get("/ready")
    async def ready() -> State:
        """Say that requests are taken; 503 while the model loads, and when the server stops."""
        if not service.generator.is_ready():
            raise not_ready(service.generator.retry_after_s())
        return State()

    @router.get("/version")
    async def show_version() -> Version:
        """Return the version of this server."""
        return Version(version=_version())

    content = {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}

    @router.get("/metrics", response_class=Response, responses={200: {"content": content}})
    async def metrics() -> Response:
        """Return the numbers for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _version() -> str:
    try:
        return version("deepseek-stack")
    except PackageNotFoundError:
        return "0"
