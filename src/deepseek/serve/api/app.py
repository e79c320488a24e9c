"""The application: routers behind guards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from deepseek.records import Event
from deepseek.serve.api.auth import ADMIN_PREFIX, Authentication, KeyStore, MemoryKeyStore
from deepseek.serve.api.errors import ERROR_RESPONSES, ApiError, api_error, validation_error
from deepseek.serve.api.guards import SLOW_READER, HostGuard, RequestLog, SizeGuard
from deepseek.serve.api.jobs import Runner
from deepseek.serve.api.limits import Clock, QuotaGuard, Quotas
from deepseek.serve.api.logprobs import TokenTexts
from deepseek.serve.api.metrics import Metrics
from deepseek.serve.api.reading import Adapters, Reader, Router
from deepseek.serve.api.routes.chat import chat_router
from deepseek.serve.api.routes.completions import completions_router
from deepseek.serve.api.routes.models import models_router
from deepseek.serve.api.routes.state import state_router
from deepseek.serve.api.routes.tokens import tokens_router
from deepseek.serve.api.service import Service
from deepseek.serve.api.settings import ApiSettings
from deepseek.serve.api.sse import let_streams_end
from deepseek.serve.generation import Generator

RouterMaker = Callable[[Service], APIRouter]
"""Makes a router from what the routers share; its `route_class` is `StrictRoute`."""

_ROUTERS: tuple[RouterMaker, ...] = (
    chat_router,
    completions_router,
    tokens_router,
    models_router,
    state_router,
)


def create_app(
    generator: Generator,
    *,
    settings: ApiSettings,
    keys: KeyStore | None = None,
    metrics: Metrics | None = None,
    on_event: Callable[[Event], None] | None = None,
    adapters: Adapters = tuple,
    router: Router | None = None,
    routers: Sequence[RouterMaker] = (),
    admin_routers: Sequence[RouterMaker] = (),
    clock: Clock = time.monotonic,
) -> FastAPI:
    """Return the application that answers for an engine.

    Args:
        generator: the engine.
        settings: limits, and the keys where `keys` is None.
        keys: where keys are looked up.
        metrics: what is exported; the engine's own numbers may be fed into it by `observe`.
        on_event: called with the event of every answer that has ended.
        adapters: names of the adapters that can be asked for now.
        router: chooses the model or adapter that answers each request, for A/B tests; the event of
            the answer says which. None for the one that was asked for.
        routers: further routes, behind the same guards.
        admin_routers: routes under `/admin`; without an admin key they do not exist.
        clock: seconds, for limits and latencies.
    """
    let_streams_end()
    keys = keys or MemoryKeyStore(settings.keys)
    metrics = metrics or Metrics(settings.model)
    quotas = Quotas(clock)
    runner = Runner(
        generator,
        settings,
        quotas=quotas,
        metrics=metrics,
        on_event=on_event or _ignore,
        clock=clock,
    )
    reader = Reader(generator, settings, adapters, router)
    service = _service(generator, settings, runner, metrics, reader)
    app = FastAPI(
        title="deepseek",
        description="OpenAI-compatible answers of one model.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=ERROR_RESPONSES,
        middleware=_guards(settings, keys, quotas, metrics, clock),
    )
    app.state.service = service
    add_error_handlers(app)
    for make in (*_ROUTERS, *routers):
        app.include_router(make(service))
    if keys.has_admin:
        for make in admin_routers:
            app.include_router(make(service), prefix=ADMIN_PREFIX)
    app.openapi = lambda: _document(app, settings.public_paths)
    return app


def _service(
    generator: Generator, settings: ApiSettings, runner: Runner, metrics: Metrics, reader: Reader
) -> Service:
    return Service(
        generator=generator,
        settings=settings,
        reader=reader,
        runner=runner,
        metrics=metrics,
        texts=TokenTexts(generator.tokenizer),
        started=int(time.time()),
    )


def create_inner_app(outer: FastAPI, routers: Sequence[RouterMaker] = ()) -> FastAPI:
    """Return the routes of an application without its guards and limits, for requests that the
    server makes of itself.

    Args:
        outer: from `create_app`.
        routers: further routes.
    """
    service: Service = outer.state.service
    inner = service.without_limits()
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    add_error_handlers(app)
    for make in (chat_router, completions_router, *routers):
        app.include_router(make(inner))
    return app


def _guards(
    settings: ApiSettings,
    keys: KeyStore,
    quotas: Quotas,
    metrics: Metrics,
    clock: Clock,
) -> list[Middleware]:
    """Return the layers around the routes, outermost first; every one may raise ApiError."""

    def count(status: int, failure: str | None) -> None:
        metrics.observe("deepseek:http_responses", label=f"{status // 100}xx")
        if failure == SLOW_READER:
            metrics.observe("deepseek:slow_readers")

    return [
        Middleware(RequestLog, clock=clock, on_response=count),
        Middleware(HostGuard, hosts=settings.hosts),
        Middleware(
            SizeGuard,
            max_headers=settings.max_headers,
            max_header_bytes=settings.max_header_bytes,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            uploads=settings.uploads,
        ),
        Middleware(Authentication, keys=keys, public_paths=settings.public_paths),
        Middleware(QuotaGuard, quotas=quotas),
    ]


def add_error_handlers(app: FastAPI) -> None:
    """Let an app answer every error in OpenAI's form."""
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors()).response()
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):
        error = _plain_error(error)
    return api_error(error).response()


def _plain_error(error: HTTPException) -> ApiError:
    """Return an error of the framework in our words."""
    known = {404: ("There is no such path.", "not_found"), 405: ("Wrong method.", "wrong_method")}
    text, code = known.get(error.status_code, ("The request cannot be read.", "bad_request"))
    return ApiError(error.status_code, text, code=code, headers=error.headers)


def _document(app: FastAPI, public_paths: frozenset[str]) -> dict[str, Any]:
    """Return the OpenAPI document, without the status 422 that FastAPI adds and nobody sends."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if path in public_paths:
                    operation["security"] = []
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _ignore(event: Event) -> None:
    """Take an event that nobody wants."""
