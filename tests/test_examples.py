"""Every example is short and runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import REPO

EXAMPLES = sorted((REPO / "examples").glob("*.py"))
MOST_LINES = 80
LONGEST_S = 300


def head(path: Path) -> str:
    """Return the first five lines, where an example says what it needs."""
    return "\n".join(path.read_text(encoding="utf-8").splitlines()[:5])


def is_slow(path: Path) -> bool:
    """Tell whether an example says `# slow`."""
    return bool(re.search(r"^# slow\b", head(path), re.MULTILINE))


def needed_model(path: Path) -> str | None:
    """Return the fixture behind `# needs: smollm2` or `# needs: minilm`."""
    found = re.search(r"^# needs: (\w+)$", head(path), re.MULTILINE)
    return f"{found.group(1)}_folder" if found else None


def run_example(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in `folder` and return how it ended."""
    return subprocess.run(
        [sys.executable, str(path)],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "agg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST_S,
    )


def is_short(path: Path) -> bool:
    """Tell whether an example keeps to its length."""
    return len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if is_slow(path) else (), id=path.stem)
        for path in EXAMPLES
    ],
)
def test_example_runs(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if (fixture := needed_model(path)) is not None:
        request.getfixturevalue(fixture)
    done = run_example(path, tmp_path)
    assert done.returncode == 0, done.stdout


def test_examples_are_short() -> None:
    assert [path.name for path in EXAMPLES if not is_short(path)] == []


def test_planted_failure_and_length_are_caught(tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text("# needs: minilm\n# slow\n" + "x = 1\n" * (MOST_LINES - 3) + "1 / 0\n")
    assert run_example(path, tmp_path).returncode == 1
    assert not is_short(path)
    assert is_slow(path)
    assert needed_model(path) == "minilm_folder"
