"""Models at rest: bundles, the formats they come in, and where they come from. Importing this loads
no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _PLACES, __all__)
