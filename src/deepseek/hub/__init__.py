"""Models at rest: bundles, the formats they come in, and where they come from. Importing this loads
no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.hub.bundle import Bundle, list_bundles
    from deepseek.hub.gptq import from_gptq, to_gptq
    from deepseek.hub.grids import quantized_weights
    from deepseek.hub.loading import load
    from deepseek.hub.pulling import pull
    from deepseek.hub.saving import Quantized, save
    from deepseek.hub.store import resolve

__all__ = [
    "Bundle",
    "Quantized",
    "from_gptq",
    "list_bundles",
    "load",
    "pull",
    "quantized_weights",
    "resolve",
    "save",
    "to_gptq",
]

_PLACES = {
    "Bundle": "bundle",
    "Quantized": "saving",
    "from_gptq": "gptq",
    "list_bundles": "bundle",
    "load": "loading",
    "pull": "pulling",
    "quantized_weights": "grids",
    "resolve": "store",
    "save": "saving",
    "to_gptq": "gptq",
}

__getattr__, __dir__ = lazy_names(__name__, _PLACES, __all__)
