"""/v1/batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from deepseek.serve.api.paging import Identified, page
from deepseek.serve.api.store_errors import stores_errors
from deepseek.serve.state.batches import BatchStore


class ExpiresAfter(BaseModel):
    """When the files of a batch go."""

    model_config = ConfigDict(extra="forbid")
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchRequest(BaseModel):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(extra="forbid")
    input_file_id: Annotated[str, Field(max_length=64)]
    endpoint: Annotated[str, Field(max_length=64)]
    completion_window: Annotated[str, Field(max_length=8)]
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


def batches_router(store: BatchStore, current_tenant: Callable[..., Any]) -> APIRouter:
    """Return the routes of batches; a `BatchRunner` of the same store runs them.

    Args:
        store: keeps them.
        current_tenant: a FastAPI dependency that gives whoever asks; its `id` is the tenant.
    """
    router = APIRouter(prefix="/v1/batches", tags=["batches"])
    whoever = Depends(current_tenant)

    @router.post("")
    def create_batch(body: BatchRequest, tenant: Identified = whoever) -> dict[str, Any]:
        """Enter a batch."""
        after = body.output_expires_after
        with stores_errors():
            return store.create(
                tenant.id,
                input_file_id=body.input_file_id,
                endpoint=body.endpoint,
                completion_window=body.completion_window,
                metadata=body.metadata,
                output_ttl_s=after.seconds if after else None,
            )

    @router.get("")
    def list_batches(
        tenant: Identified = whoever,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        """Give a page of the tenant's batches, newest first."""
        with stores_errors():
            return page(*store.list(tenant.id, after=after, limit=limit))

    @router.get("/{batch_id}")
    def get_batch(batch_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Give a batch."""
        with stores_errors():
            return store.get(tenant.id, batch_id)

    @router.post("/{batch_id}/cancel")
    def cancel_batch(batch_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Ask for the end of a batch."""
        with stores_errors():
            return store.cancel(tenant.id, batch_id)

    return router
