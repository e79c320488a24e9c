"""The names that users lean on are pinned, and the root is light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import deepseek

MOST_NAMES = 30
LONGEST_IMPORT_S = 0.3
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface_hub")

ROOT_NAMES = [
    "BackendError",
    "CapacityError",
    "ConfigError",
    "DeepseekError",
    "FormatError",
    "Measurement",
    "MissingExtra",
    "ShapeError",
    "VerifyError",
    "__version__",
    "load",
    "pull",
    "save",
]

PROBE = """
import json, sys, time
start = time.process_time()
import {module}
took_s = time.process_time() - start
print(json.dumps([took_s, [name for name in {heavy!r} if name in sys.modules]]))
"""


def probe(module: str, path: Path | None = None) -> tuple[float, list[str]]:
    """Return seconds and heavy packages of importing `module` in a fresh process.

    The time is the processor's, which the neighbours of a busy machine do not lengthen.
    """
    code = PROBE.format(module=module, heavy=HEAVY)
    if path is not None:
        code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    took_s, heavy = json.loads(done.stdout)
    return took_s, heavy


def test_root_names_are_pinned() -> None:
    assert list(deepseek.__all__) == ROOT_NAMES
    assert len(ROOT_NAMES) <= MOST_NAMES
    assert sorted(ROOT_NAMES) == ROOT_NAMES


def test_every_root_name_resolves_and_is_listed() -> None:
    missing = [name for name in ROOT_NAMES if not hasattr(deepseek, name)]
    assert not missing
    assert set(ROOT_NAMES) <= set(dir(deepseek))


def test_unknown_root_name_is_an_attribute_error() -> None:
    assert not hasattr(deepseek, "no_such_name")


def test_root_loads_nothing_heavy_and_is_quick() -> None:
    probes = [probe("deepseek") for _ in range(3)]
    assert probes[0][1] == []
    assert min(took_s for took_s, _ in probes) < LONGEST_IMPORT_S


def test_ground_floor_loads_nothing_heavy() -> None:
    modules = "deepseek.config, deepseek.errors, deepseek.records, deepseek.registry"
    assert probe(modules)[1] == []


def test_heavy_and_slow_root_is_caught(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        "import time, numpy\nwhile time.process_time() < 0.5: pass\n"
    )
    took_s, heavy = probe("planted", tmp_path)
    assert heavy == ["numpy"]
    assert took_s > LONGEST_IMPORT_S
