"""Files, functions and argument lists stay small, and a promise names where it is kept track of."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.house import REPO

MOST_FILE_LINES = 800
MOST_FUNCTION_LINES = 100
MOST_ARGUMENTS = 10
FOLDERS = ("src", "tests", "examples", "benchmarks", "docs", "scripts")
PROMISE = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
ANCHOR = re.compile(r"\((#\d+|v\d+(\.\d+)*)\)")


def python_files(root: Path) -> list[Path]:
    """Return the project's own Python files."""
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def over_budget(path: Path) -> list[str]:
    """Return a complaint for each budget that a file breaks."""
    text = path.read_text(encoding="utf-8")
    problems = []
    if (lines := text.count("\n")) > MOST_FILE_LINES:
        problems.append(f"{path}: {lines} lines, at most {MOST_FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            problems += [f"{path}:{node.lineno}: {node.name} {rest}" for rest in too_big(node)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        promises = token.type == tokenize.COMMENT and PROMISE.search(token.string)
        if promises and not ANCHOR.search(token.string):
            problems.append(f"{path}:{token.start[0]}: name the issue (#12) or release (v0.2)")
    return problems


def too_big(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return what is too big about a function."""
    problems = []
    if (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES:
        problems.append(f"has {lines} lines, at most {MOST_FUNCTION_LINES}")
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = len([argument for argument in given if argument.arg not in ("self", "cls")])
    if count > MOST_ARGUMENTS:
        problems.append(f"has {count} arguments, at most {MOST_ARGUMENTS}: make a config")
    return problems


def test_budgets_are_kept() -> None:
    problems = [problem for path in python_files(REPO) for problem in over_budget(path)]
    assert not problems, "\n" + "\n".join(problems)


def test_the_walk_sees_the_project() -> None:
    assert REPO / "src" / "deepseek" / "errors.py" in python_files(REPO)


PLANTED = {
    "long file": "x = 1\n" * (MOST_FILE_LINES + 1),
    "long function": "def f():\n" + "    x = 1\n" * MOST_FUNCTION_LINES,
    "long method": "class A:\n    async def f(self):\n" + "        x = 1\n" * MOST_FUNCTION_LINES,
    "arguments": f"def f({', '.join(f'a{i}' for i in range(9))}, *, b, c): ...\n",
    "promise": "x = 1  # TODO: later\n",
    "promise with a name": "# FIXME(somebody) soon\n",
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_excess_is_caught(tmp_path: Path, case: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(PLANTED[case])
    assert len(over_budget(path)) == 1


def test_the_limits_themselves_pass(tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    arguments = ", ".join(f"a{i}" for i in range(MOST_ARGUMENTS))
    body = "        x = 'TODO'\n" * (MOST_FUNCTION_LINES - 1)
    path.write_text(f"class A:\n    def f(self, {arguments}):\n{body}# TODO(#12): y\n")
    assert over_budget(path) == []
