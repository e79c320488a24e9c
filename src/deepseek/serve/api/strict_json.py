"""Reading JSON from strangers: bounded in depth and size, without what JSON does not have."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from deepseek.serve.api.errors import bad_request

MAX_DEPTH = 64
"""Most lists and objects inside one another."""


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ApiError: 400: it is not JSON or not UTF-8, has NaN or infinity, half a surrogate pair, a
            null character, or lists and objects more than `MAX_DEPTH` deep.
    """
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    problem = find_problem(value, MAX_DEPTH)
    if problem:
        raise bad_request(f"The body's JSON {problem}.", code="invalid_json")
    return value


def find_problem(value: Any, max_depth: int, max_items: int | None = None) -> str | None:
    """Return what is wrong with a JSON value, or None; it is walked without recursion.

    Args:
        value: lists, dicts and plain values.
        max_depth: most lists and dicts inside one another.
        max_items: most values of all kinds; None for no bound.
    """
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if isinstance(item, dict | list):
            if depth >= max_depth:
                return f"is nested more than {max_depth} deep"
            inner = [*item, *item.values()] if isinstance(item, dict) else item
            waiting.extend((part, depth + 1) for part in inner)
        elif isinstance(item, str):
            if "\0" in item:
                return "has a null character"
            if not item.isascii() and any("\ud800" <= sign <= "\udfff" for sign in item):
                return "has half a surrogate pair"
        elif isinstance(item, float) and not math.isfinite(item):
            return "has a number that is too large"
        if max_items is not None and count > max_items:
            return f"has more than {max_items} values"
    return None


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose body is read by `parse_json`: the `route_class` of every router."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind a request that reads strictly."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return handle
