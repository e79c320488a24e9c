"""Admin routes: adapters are loaded and dropped, usage is read."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel

from deepseek.serve.adapters import AdapterRegistry, LoadedAdapter
from deepseek.serve.api.errors import ApiError
from deepseek.serve.api.service import Service
from deepseek.serve.api.strict_json import StrictRoute
from deepseek.serve.state.usage import UsageLedger

AdapterName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class AdapterState(BaseModel):
    """An adapter that the registry knows."""

    name: str
    is_loaded: bool
    rank: int | None = None
    num_bytes: int | None = None


class AdapterList(BaseModel):
    """All of them."""

    data: list[AdapterState]


class UsageEntry(BaseModel):
    """What one tenant used of one model on one day (UTC)."""

    tenant: str
    model: str
    day: str
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsageReport(BaseModel):
    """All days that are kept."""

    data: list[UsageEntry]


def adapters_router(registry: AdapterRegistry) -> Callable[[Service], APIRouter]:
    """Return the maker of the router of adapters."""

    def make(service: Service) -> APIRouter:
        router = APIRouter(route_class=StrictRoute, prefix="/adapters", tags=["admin"])

        @router.get("")
        async def list_adapters() -> AdapterList:
            """Return all adapters that the registry knows."""
            loaded = {adapter.name: adapter for adapter in registry.loaded()}
            names = registry.registered()
            return AdapterList(data=[_state(name, loaded.get(name)) for name in names])

        @router.post("/{name}")
        async def load_adapter(name: AdapterName) -> AdapterState:
            """Load an adapter; it can be asked for by its name from now on."""
            _check_known(registry, name)
            return _state(name, await asyncio.to_thread(registry.load, name))

        @router.delete("/{name}")
        async def drop_adapter(name: AdapterName) -> AdapterState:
            """Drop an adapter; answers that use it are finished."""
            _check_known(registry, name)
            await asyncio.to_thread(registry.drop, name)
            return _state(name, None)

        return router

    return make


def usage_router(ledger: UsageLedger) -> Callable[[Service], APIRouter]:
    """Return the maker of the router of usage."""

    def make(service: Service) -> APIRouter:
        router = APIRouter(route_class=StrictRoute, tags=["admin"])

        @router.get("/usage")
        async def usage() -> UsageReport:
            """Return who used how much, by day."""
            await asyncio.to_thread(ledger.flush)
            lines = await asyncio.to_thread(ledger.report)
            return UsageReport(
                data=[
                    UsageEntry(
                        tenant=line.key_id,
                        model=line.model,
                        day=line.day.isoformat(),
                        **dataclasses.asdict(line.usage),
                    )
                    for line in lines
                ]
            )

        return router

    return make


def _check_known(registry: AdapterRegistry, name: str) -> None:
    if name not in registry.registered():
        raise ApiError(404, "There is no such adapter.", code="not_found", param="name")


def _state(name: str, adapter: LoadedAdapter | None) -> AdapterState:
    if adapter is None:
        return AdapterState(name=name, is_loaded=False)
    return AdapterState(name=name, is_loaded=True, rank=adapter.rank, num_bytes=adapter.num_bytes)
