"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from deepseek.errors import DeepseekError
from deepseek.serve.state.errors import NotFoundError, QuotaError, RequestError

_LOG = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Take the status of HTTP and the four fields of the body."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    def to_body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


@contextlib.contextmanager
def stores_errors() -> Iterator[None]:
    """Turn what a store refuses into an ApiError. What is the server's own trouble is logged and
    not told: it may name files and addresses."""
    try:
        yield
    except RequestError as error:
        raise ApiError(400, str(error), param=error.param) from error
    except NotFoundError as error:
        raise ApiError(404, str(error), param="id", code="not_found") from error
    except QuotaError as error:
        status, kind = (429, "rate_limit_error") if error.is_passing else (413, "quota_error")
        raise ApiError(status, str(error), kind, code="quota_exceeded") from error
    except DeepseekError as error:
        _LOG.error("state: %s", error)
        message = "The server cannot read or keep its state now."
        raise ApiError(503, message, "server_error", code="state_unavailable") from error


def add_error_handlers(app: FastAPI) -> None:
    """Let an app answer ApiErrors, and requests that do not have the right form, as OpenAI does."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.to_body(), error.status)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    param = ".".join(place) or None
    message = f"Invalid value for {param}: {first['msg']}." if param else f"{first['msg']}."
    return JSONResponse(ApiError(400, message, param=param).to_body(), 400)
