"""Delta packages: one version of a bundle into the next, small, signed, all at once or not at
all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.export.delta.applying import Applied, apply_delta, forget, rollback
    from deepseek.export.delta.keys import make_keys
    from deepseek.export.delta.making import Made, make_delta
    from deepseek.export.delta.requantizing import OnGrid, on_grid_of
    from deepseek.export.delta.verifying import Checked, verify_delta

__all__ = [
    "Applied",
    "Checked",
    "Made",
    "OnGrid",
    "apply_delta",
    "forget",
    "make_delta",
    "make_keys",
    "on_grid_of",
    "rollback",
    "verify_delta",
]

_HOMES = {
    "Applied": "applying",
    "Checked": "verifying",
    "Made": "making",
    "OnGrid": "requantizing",
    "apply_delta": "applying",
    "forget": "applying",
    "make_delta": "making",
    "make_keys": "keys",
    "on_grid_of": "requantizing",
    "rollback": "applying",
    "verify_delta": "verifying",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
