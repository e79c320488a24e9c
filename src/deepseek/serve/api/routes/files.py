"""/v1/files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from starlette.datastructures import FormData, UploadFile

from deepseek.serve.api.errors import ApiError
from deepseek.serve.api.paging import Identified, page
from deepseek.serve.api.store_errors import stores_errors
from deepseek.serve.api.uploads import bounded_form
from deepseek.serve.state.files import PURPOSES, FileStore

_PART_BYTES = 2**20
_UPLOADS = 4
"""At the same time; each may fill a temporary file of the largest size."""

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def files_router(store: FileStore, current_tenant: Callable[..., Any]) -> APIRouter:
    """Return the routes of files.

    Args:
        store: keeps them.
        current_tenant: a FastAPI dependency that gives whoever asks; its `id` is the tenant.
    """
    router = APIRouter(prefix="/v1/files", tags=["files"])
    whoever = Depends(current_tenant)
    uploads = asyncio.Semaphore(_UPLOADS)

    # The form is read by hand: FastAPI would read it whole before it asks who sends it.
    @router.post("", openapi_extra=_FORM)
    async def create_file(request: Request, tenant: Identified = whoever) -> dict[str, Any]:
        """Keep a file."""
        if uploads.locked():
            message = "Too many files are being uploaded. Come back later."
            raise ApiError(429, message, code="too_many_uploads")
        async with uploads, bounded_form(request, store.limits.file_bytes) as form:
            file, purpose, ttl_s = _fields(form)
            content = _parts(file.file)
            with stores_errors():
                made = await asyncio.to_thread(
                    store.create, tenant.id, file.filename or "", purpose, content, ttl_s=ttl_s
                )
        return made.to_dict()

    @router.get("")
    def list_files(
        tenant: Identified = whoever,
        purpose: Annotated[str | None, Query(max_length=32)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        """Give a page of the tenant's files."""
        with stores_errors():
            files, more = store.list(
                tenant.id, purpose=purpose, after=after, limit=limit, order=order
            )
        return page([file.to_dict() for file in files], more)

    @router.get("/{file_id}")
    def get_file(file_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Give what is known of a file."""
        with stores_errors():
            return store.get(tenant.id, file_id).to_dict()

    @router.get("/{file_id}/content", response_class=FileResponse)
    def get_content(file_id: str, tenant: Identified = whoever) -> FileResponse:
        """Give the content of a file."""
        with stores_errors():
            known = store.get(tenant.id, file_id)
            path = store.open_path(tenant.id, file_id)
        # Never shown by a browser as a page of ours, whatever is in it.
        return FileResponse(
            path,
            media_type="application/octet-stream",
            filename=known.filename,
            headers={"x-content-type-options": "nosniff"},
        )

    @router.delete("/{file_id}")
    def delete_file(file_id: str, tenant: Identified = whoever) -> dict[str, Any]:
        """Remove a file."""
        with stores_errors():
            store.delete(tenant.id, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def _fields(form: FormData) -> tuple[UploadFile, str, int | None]:
    """Return the file, its purpose and its time to live.

    Raises:
        ApiError: one is missing or has the wrong form.
    """
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "'file' is required.", param="file")
    if not isinstance(purpose, str):
        raise ApiError(400, "'purpose' is required.", param="purpose")
    seconds = form.get("expires_after[seconds]")
    anchor = form.get("expires_after[anchor]", "created_at")
    if anchor != "created_at":
        raise ApiError(400, "The anchor must be 'created_at'.", param="expires_after.anchor")
    if seconds is None:
        return file, purpose, None
    if not isinstance(seconds, str) or not seconds.isdecimal() or len(seconds) > 10:
        raise ApiError(400, "The seconds must be a number.", param="expires_after.seconds")
    return file, purpose, int(seconds)


def _parts(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(_PART_BYTES):
        yield part
