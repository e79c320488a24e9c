"""A room imports only from lower floors: absolute, relative, lazy, TYPE_CHECKING and by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import FLOORS, GROUND, PACKAGE, ROOT_MAY_IMPORT, SOURCE, rooms_present

ROOT = "__init__"
MODULE_NAME = re.compile(rf"{PACKAGE}(\.\w+)+(:\w+)?")


def find_violations(source: Path) -> list[str]:
    """Return one line for every import of the package under `source` that the floors forbid."""
    problems = [
        f"{source.name}/{name}: room {name!r} is not in the table of tests/house.py"
        for name in sorted(rooms_present(source) - set(FLOORS))
    ]
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        room = parts[0]
        if room != ROOT and room not in FLOORS:
            continue
        package = [PACKAGE, *parts[:-1]]
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, target in sorted(set(imports_of(tree, package)), key=lambda found: found[0]):
            problem = judge(room, target)
            if problem:
                problems.append(f"{path.relative_to(source.parent)}:{line}: {problem}")
    return problems


def imports_of(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted target of everything in `tree` that brings in a part of the package."""
    docstrings = {id(doc) for node in ast.walk(tree) if (doc := docstring_of(node)) is not None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node.lineno, alias.name
                    if alias.asname is None:
                        yield node.lineno, PACKAGE  # `import deepseek.x` binds the root's name
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.level, node.module, package)
            if base.split(".")[0] == PACKAGE:
                yield from ((node.lineno, join(base, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, target) for target in import_call(node, package))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
            listed = MODULE_NAME.fullmatch(name) and re.split("[.:]", name)[1] in FLOORS
            if listed and id(node) not in docstrings:
                yield node.lineno, name.split(":")[0]


def folders_without_init(source: Path) -> list[str]:
    """Return the folders with modules that lack an `__init__.py`."""
    folders = {path.parent for path in source.rglob("*.py")}
    return sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists())


def docstring_of(node: ast.AST) -> ast.Constant | None:
    """Return the docstring's node of a module, class or function."""
    body = getattr(node, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value
    return None


def absolute(level: int, module: str | None, package: list[str]) -> str:
    """Return the dotted name that `from <dots><module>` means inside `package`."""
    base = package[: len(package) - level + 1] if level else []
    return ".".join([*base, *([module] if module else [])])


def join(base: str, name: str) -> str:
    """Return what `from base import name` reaches: a room, or a thing of the root."""
    return f"{base}.{name}" if base == PACKAGE else base


def import_call(node: ast.Call, package: list[str]) -> Iterator[str]:
    """Yield the target of an `import_module` or `__import__` call that is given a literal."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    if called not in ("import_module", "__import__") or not node.args:
        return
    given = node.args[0]
    if isinstance(given, ast.JoinedStr):
        head = given.values[0] if given.values else None
        text = head.value if isinstance(head, ast.Constant) else ""
        if text == f"{PACKAGE}." or re.fullmatch(rf"{PACKAGE}\.\w+", str(text)):
            yield f"{PACKAGE}.<computed>"
        elif str(text).startswith((f"{PACKAGE}.", ".")):
            yield resolve(str(text).rstrip("."), node, package)
    elif isinstance(given, ast.Constant) and isinstance(given.value, str):
        target = resolve(given.value, node, package)
        if target.split(".")[0] == PACKAGE:
            yield target


def resolve(name: str, node: ast.Call, package: list[str]) -> str:
    """Return the absolute name of a literal given to `import_module`, with its package argument."""
    stripped = name.lstrip(".")
    level = len(name) - len(stripped)
    anchors = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "package")]
    if anchors and isinstance(anchors[0], ast.Constant):
        package = str(anchors[0].value).split(".")
    return absolute(level, stripped or None, package)


def judge(room: str, target: str) -> str | None:
    """Return what is wrong with `room` importing `target`, or None."""
    wanted = target.split(".")[1] if "." in target else None
    if wanted == "<computed>":
        return f"room {label(room)} imports a room by a computed name; write the name as a literal"
    if wanted not in FLOORS:
        return None if room == ROOT else root_problem(room, target)
    floor = FLOORS[wanted].floor
    if room == ROOT:
        allowed = floor == GROUND or wanted in ROOT_MAY_IMPORT
        return None if allowed else f"the package root may not import room {label(wanted)}"
    if wanted == room or floor < FLOORS[room].floor or floor == FLOORS[room].floor == GROUND:
        return None
    return f"room {label(room)} may not import room {label(wanted)}: only lower floors"


def root_problem(room: str, target: str) -> str:
    """Return the complaint about a room that reaches for the package root."""
    return f"room {label(room)} may not import the package root ({target}): import the lower room"


def label(room: str) -> str:
    """Return a room's name with its floor."""
    return f"{room!r} (floor {FLOORS[room].floor})" if room in FLOORS else f"{room!r}"


def test_rooms_import_only_lower_floors() -> None:
    problems = find_violations(SOURCE)
    assert not problems, "\n" + "\n".join(problems)


def test_every_folder_is_a_package() -> None:
    assert folders_without_init(SOURCE) == []


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write a package of the given files and return its folder."""
    source = root / PACKAGE
    for name, text in {"__init__.py": "", **files}.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return source


FORBIDDEN = {
    "absolute from": ("models/llama.py", "from deepseek.hub import load\n"),
    "absolute import": ("models/llama.py", "import deepseek.hub.load as load\n"),
    "of a module": ("models/llama.py", "from deepseek.hub.load import load\n"),
    "through the root": ("models/llama.py", "from deepseek import hub\n"),
    "relative": ("models/llama.py", "from ..hub import load\n"),
    "relative deep": ("models/families/llama.py", "from ...hub import load\n"),
    "relative from the root": ("models/llama.py", "from .. import hub\n"),
    "relative in __init__": ("models/__init__.py", "from ..hub import load\n"),
    "lazy": ("models/llama.py", "def load():\n    from deepseek.hub import load\n"),
    "type checking": (
        "models/llama.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from deepseek.hub import load\n",
    ),
    "import_module": (
        "models/llama.py",
        "import importlib\nhub = importlib.import_module('deepseek.hub')\n",
    ),
    "import_module relative": (
        "models/llama.py",
        "from importlib import import_module\nhub = import_module('..hub', __package__)\n",
    ),
    "import_module relative to a literal": (
        "models/llama.py",
        "from importlib import import_module\nhub = import_module('.hub', package='deepseek')\n",
    ),
    "__import__": ("models/llama.py", "hub = __import__('deepseek.hub')\n"),
    "table of lazy strings": ("models/llama.py", "LAZY = {'load': 'deepseek.hub:load'}\n"),
    "sideways": ("models/llama.py", "from deepseek.graph import capture\n"),
    "upward from a ground module": ("records.py", "from deepseek.ops import attention\n"),
    "a leaf": ("serve/api.py", "from deepseek.cli import main\n"),
    "leaf to leaf": ("recipes/health.py", "from deepseek.cli import main\n"),
    "the root points at a room": ("__init__.py", "from deepseek.hub import load\n"),
    "the root points lazily": ("__init__.py", "LAZY = {'load': 'deepseek.hub'}\n"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_planted_violation_is_caught(tmp_path: Path, case: str) -> None:
    name, text = FORBIDDEN[case]
    line = text.count("\n")
    problems = find_violations(plant(tmp_path, {name: text}))
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{PACKAGE}/{name}:{line}: ")
    if name.startswith("models/"):
        upper = "'graph' (floor 2)" if case == "sideways" else "'hub' (floor 3)"
        assert "'models' (floor 2)" in problems[0] and upper in problems[0]


ROOT_IMPORTS = {
    "plain": "import deepseek\n",
    "aliased": "import deepseek as ds\n",
    "name": "from deepseek import load\n",
    "star": "from deepseek import *\n",
    "relative": "from .. import load\n",
    "submodule that binds the root": "import deepseek.config\n",
    "lazy": "def load():\n    import deepseek\n",
    "import_module": "import importlib\nds = importlib.import_module('deepseek')\n",
}


@pytest.mark.parametrize("case", ROOT_IMPORTS)
def test_planted_import_of_the_root_is_caught(tmp_path: Path, case: str) -> None:
    source = plant(tmp_path, {"models/llama.py": ROOT_IMPORTS[case]})
    problems = find_violations(source)
    assert len(problems) == 1 and "may not import the package root" in problems[0], problems


def test_computed_name_of_a_room_is_caught(tmp_path: Path) -> None:
    text = (
        "import importlib\ndef get(name):\n    return importlib.import_module(f'deepseek.{name}')\n"
    )
    problems = find_violations(plant(tmp_path, {"models/llama.py": text}))
    assert len(problems) == 1 and "computed name" in problems[0], problems


@pytest.mark.parametrize("name", ["attic/box.py", "attic/deep/box.py", "attic.py", "_hidden.py"])
def test_unlisted_room_is_caught(tmp_path: Path, name: str) -> None:
    problems = find_violations(plant(tmp_path, {name: ""}))
    assert len(problems) == 1 and "is not in the table" in problems[0], problems


def test_folder_without_init_is_caught(tmp_path: Path) -> None:
    source = plant(tmp_path, {"models/llama.py": ""})
    assert folders_without_init(source) == [str(source / "models")]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    files = {
        "__init__.py": "LAZY = {'load': 'deepseek.face'}\nfrom .errors import ConfigError\n",
        "__main__.py": "from deepseek.cli.main import main\n",
        "config.py": "from deepseek.errors import ConfigError\n",
        "face.py": "from deepseek.hub import load\nfrom .generate import generate\n",
        "cli/main.py": "def go(v):\n    importlib.import_module(f'deepseek.cli.{v}')\n",
        "cli/demo.py": "from deepseek.face import load\nfrom . import main\n",
        "hub/load.py": (
            '"""deepseek.serve"""\n'
            "import numpy, deepseek_v3\n"
            "from deepseek.models import Decoder\n"
            "from .files import read\n"
            "from ..ops.rope import rotate\n"
            "import deepseek.errors as errors\n"
            "LOG = 'deepseek.something'\n"
        ),
    }
    assert find_violations(plant(tmp_path, files)) == []


def test_table_is_a_stack_of_floors() -> None:
    floors = {room.floor for room in FLOORS.values()}
    assert floors == set(range(max(floors) + 1))
    assert set(FLOORS) >= ROOT_MAY_IMPORT
