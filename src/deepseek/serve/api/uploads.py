"""Forms with a file in them, read no further than they may be long."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.types import Message

from deepseek.serve.api.errors import ApiError

_MOST_FIELDS = 8
_FIELD_BYTES = 4096
_FRAME_BYTES = 16 * 1024
"""Boundaries, headers of parts and the small fields."""


@contextlib.asynccontextmanager
async def bounded_form(request: Request, most_bytes: int) -> AsyncIterator[FormData]:
    """Yield the form of a request with at most one file of at most so many bytes.

    A form that is too long is refused as soon as that is known: by its Content-Length, else when
    too much of it has come. What has come is in a temporary file, which goes with the block.

    Raises:
        ApiError: 413 for too long a form, 400 for what is not a form.
    """
    most = most_bytes + _FRAME_BYTES
    refusal = ApiError(413, f"A file may have at most {most_bytes} bytes.", code="file_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise refusal
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(400, "The body must be multipart/form-data.", param="file")
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > most:
            raise refusal
        return message

    bounded = Request(request.scope, receive)
    try:
        form = await bounded.form(max_files=1, max_fields=_MOST_FIELDS, max_part_size=_FIELD_BYTES)
    except ApiError:
        raise
    except HTTPException as error:
        raise ApiError(400, f"The form cannot be read: {error.detail}") from error
    try:
        yield form
    finally:
        await form.close()
