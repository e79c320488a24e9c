"""What the pages show runs, links lead somewhere, and generated pages are up to date."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.house import REPO
from tests.pages import blocks, broken_links, commands, complaints, run_page, steps

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])


def read(page: Path) -> str:
    """Return a page's text."""
    return page.read_text(encoding="utf-8")


def needed_models(text: str) -> list[str]:
    """Return the fixtures behind `<!-- needs: smollm2 -->` and the like."""
    return [f"{name}_folder" for name in re.findall(r"<!-- needs: (\w+) -->", text)]


def runnable() -> list[object]:
    """Return the pages that have something to run, marked slow where they say so."""
    found = []
    for page in PAGES:
        if steps(read(page)):
            marks = pytest.mark.slow if "<!-- slow -->" in read(page) else ()
            found.append(pytest.param(page, marks=marks, id=page.relative_to(REPO).as_posix()))
    return found


def make_targets() -> set[str]:
    """Return the verbs of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", read(REPO / "Makefile"), re.MULTILINE))


def unknown_verbs(name: str, text: str) -> list[str]:
    """Return a complaint for each `$ make VERB` that the Makefile does not have."""
    return [
        f"{name}:{line}: make has no verb {words[1]}"
        for block in blocks(text)
        if block.language == "console"
        for line, words in commands(block)
        if words[:1] == ["make"] and words[1:] and words[1] not in make_targets()
    ]


def generator() -> ModuleType:
    """Return docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_docs", REPO / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", runnable())
def test_page_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for fixture in needed_models(read(page)):
        request.getfixturevalue(fixture)
    done = run_page(str(page.relative_to(REPO)), read(page), tmp_path)
    assert done.returncode == 0, done.stdout


def test_fences_are_marked_as_agreed() -> None:
    problems = [line for page in PAGES for line in complaints(str(page.name), read(page))]
    assert not problems, "\n".join(problems)


def test_make_verbs_exist() -> None:
    assert not [line for page in PAGES for line in unknown_verbs(page.name, read(page))]


def test_links_lead_somewhere() -> None:
    problems = [line for page in PAGES for line in broken_links(page, REPO)]
    assert not problems, "\n".join(problems)


def test_generated_pages_are_up_to_date() -> None:
    module = generator()
    assert module.stale(module.DOCS, module.pages()) == [], "run `make docs`"


@pytest.mark.slow
def test_site_builds_and_needs_no_other_host(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(site)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [
        f"{path.name}: {found}"
        for path in [*site.rglob("*.html"), *site.rglob("*.css")]
        for found in fetched_from_elsewhere(read(path))
    ]
    assert loaded == []


def fetched_from_elsewhere(text: str) -> list[str]:
    """Return what a built page would load from another host."""
    tags = r"<(?:script|img|iframe)\b[^>]*?src=\"?(?:https?:)?//[^\" >]+"
    styles = r"<link\b[^>]*?href=\"?(?:https?:)?//[^\" >]+|url\([\"']?(?:https?:)?//[^)]+"
    return re.findall(f"{tags}|{styles}", text)


PAGE = """\
# Planted

```python
word = "kept"
```

Text.

```python
print(word)
assert word != "kept"
```
"""


def test_planted_error_in_a_page_is_caught(tmp_path: Path) -> None:
    done = run_page("planted.md", PAGE, tmp_path)
    assert done.returncode == 1
    assert "kept\n" in done.stdout
    assert 'File "planted.md", line 11' in done.stdout
    assert 'assert word != "kept"' in done.stdout


def test_planted_failing_command_is_caught(tmp_path: Path) -> None:
    text = "```console\n$ ls\n$ deepseek no-such-verb \\\n    --json\n```\n"
    done = run_page("planted.md", text, tmp_path)
    assert done.returncode == 1
    assert "planted.md:3: exit" in done.stdout


def test_page_that_holds_runs_in_order(tmp_path: Path) -> None:
    text = "```python\nopen('a', 'w').close()\n```\n```python no-run\n# needs a GPU\n1 / 0\n```\n"
    text += "- list\n\n    ```python\n    import os\n    assert os.listdir('.') == ['a']\n    ```\n"
    done = run_page("planted.md", text, tmp_path)
    assert done.returncode == 0, done.stdout
    assert complaints("planted.md", text) == []


@pytest.mark.parametrize(
    "text",
    [
        "```python no-run\n1 / 0\n```\n",
        "```console no-run\n$ deepseek demo\n```\n",
        "```python norun\n# because\n1 / 0\n```\n",
        "```bash\ndeepseek demo\n```\n",
    ],
)
def test_planted_fence_is_caught(text: str) -> None:
    assert len(complaints("planted.md", text)) == 1


def test_planted_verb_is_caught() -> None:
    assert len(unknown_verbs("planted.md", "```console\n$ make demo\n$ make tea\n```\n")) == 1


def test_planted_links_are_caught(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `B` heading\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-b-heading) [c](https://example.org) `[x](y)`\n"
        "[d](gone.md)\n[e](other.md#gone)\n[f](../out.md)\n"
    )
    assert len(broken_links(page, tmp_path)) == 3


def test_planted_stale_pages_are_caught(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "floors.md").write_text("old")
    (tmp_path / "reference" / "gone.md").write_text("left over")
    made = {"floors.md": "new", "reference/hub.md": "new"}
    assert generator().stale(tmp_path, made) == [
        "floors.md",
        "reference/gone.md",
        "reference/hub.md",
    ]


def test_verbs_are_read_from_the_overview() -> None:
    overview = "usage: deepseek\n\nverbs:\n  demo   the job\n         of all\n  pull   get\n\nend\n"
    assert generator().verbs(overview) == ["demo", "pull"]
    with pytest.raises(ValueError, match="verbs:"):
        generator().verbs("usage: deepseek")


def test_planted_host_is_caught() -> None:
    text = '<script src="//cdn.example.org/a.js"></script><a href="https://example.org">x</a>'
    text += "<style>a { src: url('https://example.org/f.woff') }</style>"
    assert len(fetched_from_elsewhere(text)) == 2
