"""Write requirements.lock: the versions that the development environment is made of.

Run it by `make lock`. pip resolves the project's extras afresh, with the newest versions that fit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
EXTRAS = "dev,eval,executorch,preference,track"

HEADER = f"""\
# What `make setup` installs, as pip constraints; written by `make lock`, not by hand.
# Extras: {EXTRAS}. No hashes: torch is built differently for each platform (CPU, CUDA, macOS), and
# so are its accelerator packages, which are therefore left out.
"""

FOLLOWS_TORCH = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b")


def resolve(torch: str) -> list[dict[str, dict[str, str]]]:
    """Return what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report)]
        command += [f"torch=={torch}", f"{REPO}[{EXTRAS}]"]
        subprocess.run(command, check=True)
        return json.loads(report.read_text(encoding="utf-8"))["install"]


def pins(installed: list[dict[str, dict[str, str]]]) -> list[str]:
    """Return sorted `name==version` lines, without the project and without local versions."""
    lines = []
    for item in installed:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if name != "deepseek-stack" and not FOLLOWS_TORCH.match(name):
            lines.append(f"{name}=={item['metadata']['version'].split('+')[0]}")
    return sorted(lines)


def main() -> None:
    """Resolve and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="the version of torch, which is chosen")
    lines = pins(resolve(parser.parse_args().torch))
    (REPO / "requirements.lock").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
