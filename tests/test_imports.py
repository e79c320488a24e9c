"""Optional packages stay optional, and what is imported is declared."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.house import PACKAGE, REPO, SOURCE

IMPORT_NAMES = {
    "lm-eval": "lm_eval",
    "mlflow-skinny": "mlflow",
    "psycopg[binary]": "psycopg",
    "python-multipart": "python_multipart",
    "huggingface-hub": "huggingface_hub",
    "pyyaml": "yaml",
    "pre-commit": "pre_commit",
}
"""Import names of distributions, where they differ."""

NEEDS_EXTRA = {
    "deepseek.autoclasses.config": "transformers",
    "deepseek.autoclasses.model": "transformers",
    "deepseek.cli.serve_keys": "alembic",
    "deepseek.serve.api": "fastapi",
    "deepseek.serve.assembly": "fastapi",
    "deepseek.serve.durable": "fastapi",
    "deepseek.serve.running": "uvicorn",
    "deepseek.serve.telemetry": "fastapi",
    **{
        f"deepseek.serve.state.{name}": "sqlalchemy"
        for name in (
            "background",
            "batch_runner",
            "batch_work",
            "batches",
            "files",
            "keys",
            "migrations.versions.0001_first_tables",
            "migrations.versions.0002_background_responses",
            "responses",
            "tables",
            "usage",
        )
    },
    **{
        f"deepseek.serve.responses.{name}": "pydantic"
        for name in ("answer", "chat", "events", "items", "request")
    },
    "deepseek.serve.state.database": "alembic",
    "deepseek.serve.state.migrations.env": "alembic",
}
"""Modules that are useless without an optional package: module -> what it imports."""

PROBE = """
import importlib, importlib.abc, json, pkgutil, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {folder!r})
failed = {{}}
root = importlib.import_module({package!r})
found = pkgutil.walk_packages(root.__path__, {package!r} + ".", lambda name: None)
names = [module.name for module in found]
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps({{"count": len(names), "failed": failed}}))
"""


def project() -> dict[str, object]:
    """Return the `[project]` table."""
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def import_names(requirements: list[str]) -> set[str]:
    """Return the top-level import names of a list of requirements."""
    names = {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0] for line in requirements}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def required() -> set[str]:
    """Return import names of the packages that are always there."""
    return import_names(project()["dependencies"])


def optional() -> set[str]:
    """Return import names of the packages that only an extra brings."""
    extras = project()["optional-dependencies"].values()
    own = str(project()["name"]).replace("-", "_")
    return import_names([line for extra in extras for line in extra]) - required() - {own}


def failures_without(blocked: set[str], folder: Path, package: str) -> dict[str, str]:
    """Return module -> error of importing all of a package in a fresh process without `blocked`."""
    code = PROBE.format(blocked=sorted(blocked), folder=str(folder), package=package)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["count"] > 0
    return answer["failed"]


def undeclared_imports(source: Path, declared: set[str]) -> list[str]:
    """Return a complaint for each import of a package that pyproject.toml does not name."""
    problems = []
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = {str(node.module).split(".")[0]}
            else:
                continue
            strange = tops - sys.stdlib_module_names - declared - {source.name}
            where = f"{path.relative_to(source.parent)}:{node.lineno}"
            problems += [f"{where}: {top} is not declared in pyproject.toml" for top in strange]
    return problems


def test_package_imports_without_optional_packages() -> None:
    failed = failures_without(optional(), SOURCE.parent, PACKAGE)
    for module, package in NEEDS_EXTRA.items():
        assert f"{package} is blocked" in failed.pop(module, "")
    assert not failed, json.dumps(failed, indent=2)


def test_imports_are_declared() -> None:
    problems = undeclared_imports(SOURCE, required() | optional())
    assert not problems, "\n".join(problems)


def test_optional_packages_are_known() -> None:
    assert {"transformers", "peft", "matplotlib", "lm_eval", "pytest"} <= optional()
    assert "torch" not in optional()


def test_planted_import_of_an_optional_package_is_caught(tmp_path: Path) -> None:
    room = tmp_path / "planted" / "room"
    room.mkdir(parents=True)
    (room.parent / "__init__.py").write_text("")
    (room / "__init__.py").write_text("")
    (room / "good.py").write_text("def use():\n    import matplotlib\n")
    (room / "bad.py").write_text("import matplotlib.pyplot\n")
    failed = failures_without({"matplotlib"}, tmp_path, "planted")
    assert list(failed) == ["planted.room.bad"]


def test_planted_undeclared_import_is_caught(tmp_path: Path) -> None:
    source = tmp_path / "planted"
    source.mkdir()
    text = "import json\nimport planted.x\ndef lazy():\n    from yaml import load\n"
    (source / "a.py").write_text(text)
    assert undeclared_imports(source, {"torch"}) == [
        "planted/a.py:4: yaml is not declared in pyproject.toml"
    ]
