"""Lists as OpenAI gives them, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Identified(Protocol):
    """Whoever a request is for, as the dependency `current_tenant` tells it."""

    @property
    def id(self) -> str:
        """The tenant's name in every store."""
        ...


def page(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Return OpenAI's list object; every item has an `id`."""
    return {
        "object": "list",
        "data": list(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
