"""Registration of our own models with transformers' Auto classes, once transformers is used.

A bundle of a family that transformers knows loads there without us. One of our own family
(`model_type: deepseek_stack`) needs a config and a model class there; this module adds them the
moment transformers' Auto modules are imported, before or after `import deepseek`, and imports
nothing itself.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

_AUTO = "transformers.models.auto"
_WATCHED = {
    f"{_AUTO}.configuration_auto": "deepseek.autoclasses.config",
    f"{_AUTO}.modeling_auto": "deepseek.autoclasses.model",
}
"""Modules of transformers, and ours whose `register` runs once they have."""


def register_when_imported() -> None:
    """Register with what is imported of transformers' Auto modules, and watch for the rest."""
    for watched in _WATCHED:
        if watched in sys.modules:
            _register(watched)
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())


def _register(watched: str) -> None:
    try:
        importlib.import_module(_WATCHED[watched]).register()
    except Exception as error:
        # transformers must go on working, whatever its version makes of our classes
        message = f"deepseek could not register with transformers' Auto classes: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class _AutoFinder:
    """Lets the usual finders find the watched modules, and registers once one of them has run."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the module's own spec with a loader that registers afterwards."""
        if fullname not in _WATCHED or getattr(self._asking, "name", None) == fullname:
            return None
        from importlib.util import find_spec

        self._asking.name = fullname
        try:
            spec = find_spec(fullname)
        finally:
            self._asking.name = None
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _RegisteringLoader(spec.loader))
        return spec


class _RegisteringLoader:
    """Runs a module through its own loader, then registers.

    It has no base class: importing that takes as long as all else that `import deepseek` does.
    """

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        """Return what the module's own loader creates."""
        return self._inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module, then register."""
        self._inner.exec_module(module)
        _register(module.__name__)
