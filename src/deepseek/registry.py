"""Names of things to the places they are found at: what a room gives is imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence


def lazy_names(
    room: str, homes: Mapping[str, str], names: Sequence[str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a room's `__getattr__` and `__dir__`, by which its names are fetched when asked for.

    Args:
        room: the package, its `__name__`.
        homes: the module of each name, within the room. None may be named like what it gives:
            importing it would hide that.
        names: the room's `__all__`.

    Example:
        __getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
    """

    def fetch(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{room}.{homes[name]}"), name)

    return fetch, lambda: sorted(names)
