"""The core stands on the ground floor alone: no torch, no numpy, no clock, no input or output."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import deepseek.serve.core

FOLDER = Path(deepseek.serve.core.__file__).parent

ALLOWED = {
    *("__future__", "array", "bisect", "collections", "dataclasses", "enum", "hashlib"),
    *("itertools", "math", "statistics", "typing"),
    *("deepseek.config", "deepseek.errors", "deepseek.serve.core"),
}


def test_core_imports_nothing_that_has_time_threads_or_files() -> None:
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name is not None
                is_known = any(name == known or name.startswith(f"{known}.") for known in ALLOWED)
                assert is_known, f"{path.name} imports {name}"


def test_core_loads_nothing_heavy() -> None:
    modules = ", ".join(f"deepseek.serve.core.{path.stem}" for path in FOLDER.glob("[!_]*.py"))
    code = f"import sys, {modules}\nprint({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
