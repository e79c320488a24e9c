"""A pytest plugin: the kernels of scripts/sanitize.sh in place of the installed ones."""

from __future__ import annotations

import importlib.util
import os
import sys

NAME = "deepseek.ops.cpu._cpu"

path = os.environ["SANITIZED_KERNELS"]
spec = importlib.util.spec_from_file_location(NAME, path)
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[NAME] = module
