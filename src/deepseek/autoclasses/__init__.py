"""Registration of our own models with transformers' Auto classes, once transformers is used.

A bundle of a family that transformers knows loads there without us. One of our own family
(`model_type: deepseek_stack`) needs a config and a model class there; this module adds them the
moment transformers' Auto modules are imported, before or after `import deepseek`, and imports
nothing itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

_AUTO = "transformers.models.auto.modeling_auto"


def register_when_imported() -> None:
    """Register now if transformers' Auto classes are imported, else as soon as they are."""
    if _AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())


def _register() -> None:
    importlib.import_module("deepseek.autoclasses.model").register()


class _AutoFinder(importlib.abc.MetaPathFinder):
    """Waits for one module, lets the usual finders find it, and registers once it has run."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec with a loader that registers afterwards."""
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Runs a module through its own loader, then registers."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """Return what the module's own loader creates."""
        return self._inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module, then register."""
        self._inner.exec_module(module)
        _register()
