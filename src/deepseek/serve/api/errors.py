"""Every error a client sees: OpenAI's shape, the right status, nothing of the inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deepseek.errors import CapacityError, ConfigError, DeepseekError
from deepseek.serve.generation import DeadlineError, EngineError, QueueFull

MAX_MESSAGE = 600
"""Most characters of a message."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
    504: "deadline_error",
}


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer whose status is 400 or more."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error with its status, and what the client reads."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            status: of the answer.
            message: for a person.
            code: for a program.
            param: the field of the request that is wrong.
            retry_after_s: seconds after which to try again; sent rounded up.
            headers: further headers of the answer.
        """
        given = dict(headers or {})
        if retry_after_s is not None:
            given["Retry-After"] = str(max(1, math.ceil(min(retry_after_s, 86_400))))
        super().__init__(status, message[:MAX_MESSAGE], headers=given)
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kind = _TYPES.get(self.status_code, "server_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status_code, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """Return what a client may know of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, QueueFull):
        text = "The server has too much to do. Try again later."
        return ApiError(503, text, code="overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, DeadlineError):
        # openai's client tries a 504 again by itself; a deadline that has passed does not come back
        headers = {"x-should-retry": "false"}
        text = "The answer cannot come before the deadline."
        return ApiError(504, text, code="deadline_exceeded", param="deadline_ms", headers=headers)
    if isinstance(error, EngineError):
        text = "The engine has stopped; this request is lost."
        return ApiError(503, text, code="engine_error", retry_after_s=5)
    if isinstance(error, CapacityError):
        text = "There is no room for this request now. Try again later."
        return ApiError(503, text, code="overloaded", retry_after_s=5)
    if isinstance(error, ConfigError):
        return bad_request(str(error), code="invalid_value")
    code = "internal_error" if not isinstance(error, DeepseekError) else "server_error"
    return ApiError(500, "The server failed on this request.", code=code)


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return a 400 that names the first of the fields that pydantic refused."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place)[:200] or None
    message = str(problem["msg"])
    return bad_request(f"{param}: {message}" if param else message, param, "invalid_value")


def not_ready(retry_after_s: float) -> ApiError:
    """Return a 503: the model is loading, or the server is going down."""
    text = "The server does not take requests now: it is starting or stopping."
    return ApiError(503, text, code="not_ready", retry_after_s=retry_after_s)


ERROR_STATUSES = (400, 401, 403, 404, 408, 413, 421, 429, 431, 500, 503, 504)
"""What any route may answer when it does not do what was asked."""

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": _TYPES.get(status, "server_error")}
    for status in ERROR_STATUSES
}
"""The same for the OpenAPI document."""
