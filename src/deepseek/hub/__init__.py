"""Models at rest: bundles, the formats they come in, and where they come from. Importing this loads
no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek.hub.bundle import Bundle, list_bundles
    from deepseek.hub.loading import load
    from deepseek.hub.pulling import pull
    from deepseek.hub.saving import save
    from deepseek.hub.store import resolve

__all__ = ["Bundle", "list_bundles", "load", "pull", "resolve", "save"]

_PLACES = {
    "Bundle": "bundle",
    "list_bundles": "bundle",
    "load": "loading",
    "pull": "pulling",
    "resolve": "store",
    "save": "saving",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
