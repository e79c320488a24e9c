"""Models for other runtimes, in the formats that those read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.export.edge import (
        EdgeModel,
        EdgePlan,
        EdgeProfile,
        optimize_for_edge,
        plan_for_edge,
    )
    from deepseek.export.formats import (
        FORMATS,
        Exported,
        Format,
        Reader,
        export,
        known_formats,
        open_exported,
    )
    from deepseek.export.gguf import write_gguf
    from deepseek.export.verifying.verifier import Verified, verify

__all__ = [
    "FORMATS",
    "EdgeModel",
    "EdgePlan",
    "EdgeProfile",
    "Exported",
    "Format",
    "Reader",
    "Verified",
    "export",
    "known_formats",
    "open_exported",
    "optimize_for_edge",
    "plan_for_edge",
    "verify",
    "write_gguf",
]

_HOMES = {
    "FORMATS": "formats",
    "EdgeModel": "edge",
    "EdgePlan": "edge",
    "EdgeProfile": "edge",
    "Exported": "formats",
    "Format": "formats",
    "Reader": "formats",
    "Verified": "verifying.verifier",
    "export": "formats",
    "known_formats": "formats",
    "open_exported": "formats",
    "optimize_for_edge": "edge",
    "plan_for_edge": "edge",
    "verify": "verifying.verifier",
    "write_gguf": "gguf",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
