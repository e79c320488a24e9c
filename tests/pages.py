"""Reads the code out of Markdown pages, and runs a page from top to bottom.

A fence is run when it is `python` (one namespace for the whole page) or `console` (its lines that
start with `$ deepseek`). It is not run when it says so, as in ```` ```python no-run ````, with the
reason as a comment on its first line or in an HTML comment on the line before. A page that says
`<!-- slow -->` is run with the slow tests; `<!-- needs: smollm2 -->` names a model it uses.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,})(?P<info>[^`]*)$")
LONGEST_S = 600


@dataclasses.dataclass(frozen=True)
class Block:
    """The text of one fence, the line its code starts at, and what its first line says."""

    info: str
    line: int
    text: str
    before: str

    @property
    def language(self) -> str:
        """The first word after the ticks."""
        return self.info.split()[0] if self.info.split() else ""

    @property
    def is_run(self) -> bool:
        """Whether tests run it."""
        return self.language in ("python", "console") and "no-run" not in self.info.split()


def blocks(text: str) -> list[Block]:
    """Return the fences of a page in order."""
    found: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if opening is None:
            continue
        start, cut = number, len(opening["indent"])
        while number < len(lines) and lines[number].strip() != opening["ticks"]:
            number += 1
        body = "".join(f"{line[cut:]}\n" for line in lines[start:number])
        before = lines[start - 2].strip() if start > 1 else ""
        found.append(Block(opening["info"].strip(), start + 1, body, before))
        number += 1
    return found


def complaints(name: str, text: str) -> list[str]:
    """Return what is wrong with how the fences of a page are marked."""
    problems = []
    for block in blocks(text):
        words = block.info.split()[1:]
        if block.language in ("python", "console") and words not in ([], ["no-run"]):
            problems.append(f"{name}:{block.line - 1}: {block.info!r}: only no-run may follow")
        reason = block.text.lstrip().startswith("#") or re.match(r"<!--.+-->", block.before)
        if "no-run" in words and not reason:
            problems.append(f"{name}:{block.line - 1}: no-run without a comment that says why")
        if block.language in ("py", "python3", "bash", "sh", "shell", "pycon"):
            problems.append(f"{name}:{block.line - 1}: write python or console, which are run")
    return problems


def commands(block: Block) -> list[tuple[int, list[str]]]:
    """Return line and words of each `$ ` command of a console block; a backslash continues it."""
    found: list[tuple[int, list[str]]] = []
    lines = block.text.splitlines()
    number = 0
    while number < len(lines):
        line, start = lines[number], number
        while line.startswith("$ ") and line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = line[:-1] + lines[number]
        if line.startswith("$ "):
            found.append((block.line + start, shlex.split(line[2:], comments=True)))
        number += 1
    return found


def steps(text: str) -> list[dict[str, object]]:
    """Return what a page has to run, in order: Python source, or the words of a command."""
    found: list[dict[str, object]] = []
    for block in blocks(text):
        if block.is_run and block.language == "python":
            found.append({"line": block.line, "python": block.text})
        elif block.is_run:
            ours = (pair for pair in commands(block) if pair[1][:1] == ["deepseek"])
            found += [{"line": line, "words": words} for line, words in ours]
    return found


def script(name: str, text: str) -> str:
    """Return a Python program that runs a page; errors name the page's own lines."""
    return RUNNER.format(steps=json.dumps(steps(text)), name=name)


RUNNER = """
import json, linecache, subprocess, sys, traceback
from pathlib import Path

sys.excepthook = traceback.print_exception  # it shows the page's lines, out of linecache

def main():
    name, names = {name!r}, {{"__name__": "__main__"}}
    for step in json.loads({steps!r}):
        if "python" in step:
            text = "\\n" * (step["line"] - 1) + step["python"]
            linecache.cache[name] = (len(text), None, text.splitlines(True), name)
            exec(compile(text, name, "exec"), names)
            continue
        words = [str(Path(sys.executable).parent / "deepseek"), *step["words"][1:]]
        done = subprocess.run(words, stdin=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"{{name}}:{{step['line']}}: exit {{done.returncode}}: {{step['words']}}")

main()
"""


def run_page(name: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page in `folder`, in a process of its own, and return how it ended."""
    return subprocess.run(
        [sys.executable, "-c", script(name, text)],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "agg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST_S,
    )


def without_code(text: str) -> str:
    """Return a page without its fences and inline code, line numbers kept."""
    kept, ticks = [], ""
    for line in text.splitlines():
        fence = FENCE.match(line)
        if ticks:
            ticks = "" if line.strip() == ticks else ticks
            kept.append("")
        elif fence:
            ticks = fence["ticks"]
            kept.append("")
        else:
            kept.append(re.sub(r"(`+).+?\1", "", line))
    return "\n".join(kept)


def broken_links(page: Path, root: Path) -> list[str]:
    """Return a complaint for each relative link of a page that leads nowhere, or out of `root`."""
    problems = []
    text = without_code(page.read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), start=1):
        for target in re.findall(r"\]\(<?([^)\s>]+)", line):
            where = f"{page.relative_to(root)}:{number}"
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            aim = (page.parent / path).resolve() if path else page
            if not aim.is_relative_to(root) or not aim.exists():
                problems.append(f"{where}: {target} does not exist")
            elif anchor and aim.suffix == ".md" and anchor not in anchors(aim):
                problems.append(f"{where}: {target} has no such heading")
    return problems


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs and code hosts make them."""
    headings = re.findall(r"^#+\s+(.*?)\s*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    cleaned = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in cleaned}
