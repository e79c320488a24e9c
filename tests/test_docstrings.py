"""Every module, and every public class, function and method, says what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import SOURCE

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undocumented(source: Path) -> list[str]:
    """Return a complaint for each thing under `source` that lacks its docstring."""
    problems = []
    for path in sorted(source.rglob("*.py")):
        where = path.relative_to(source.parent)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            problems.append(f"{where}:1: the module has no docstring")
        if is_public_module(path.relative_to(source)):
            for node in public_definitions(tree.body):
                if not ast.get_docstring(node):
                    problems.append(f"{where}:{node.lineno}: {node.name} has no docstring")
    return problems


def is_public_module(path: Path) -> bool:
    """Tell whether no part of the path is private."""
    parts = path.with_suffix("").parts
    return not any(part.startswith("_") and part != "__init__" for part in parts)


def public_definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Yield public definitions of a module or class body, and those inside its public classes."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from public_definitions(node.body)
        if not isinstance(node, Definition) or node.name.startswith("_") or is_excused(node):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body)


def is_excused(node: Definition) -> bool:
    """Tell whether the text stands elsewhere: overloads, setters, declared overrides."""
    names = [ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list]
    return bool({"overload", "setter", "override"} & set(names))


def test_everything_public_is_documented() -> None:
    problems = undocumented(SOURCE)
    assert not problems, "\n" + "\n".join(problems)


PLANTED = {
    "module": "x = 1\n",
    "function": '"""M."""\ndef f(): ...\n',
    "coroutine": '"""M."""\nasync def f(): ...\n',
    "class": '"""M."""\nclass A: ...\n',
    "method": '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n',
    "property": '"""M."""\nclass A:\n    """A."""\n    @property\n    def f(self): ...\n',
    "inner class": '"""M."""\nclass A:\n    """A."""\n    class B: ...\n',
    "under a condition": '"""M."""\nif True:\n    def f(): ...\n',
    "empty docstring": '"""M."""\ndef f():\n    ""\n',
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_silence_is_caught(tmp_path: Path, case: str) -> None:
    (tmp_path / "planted.py").write_text(PLANTED[case])
    assert len(undocumented(tmp_path)) == 1


def test_private_things_may_be_silent(tmp_path: Path) -> None:
    text = '"""M."""\ndef _f(): ...\nclass _A:\n    def f(self): ...\n'
    (tmp_path / "public.py").write_text(text)
    (tmp_path / "_private.py").write_text('"""M."""\ndef f(): ...\n')
    assert undocumented(tmp_path) == []
