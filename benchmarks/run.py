"""Runs the benchmarks and writes one JSON file each, with what the machine is.

    python benchmarks/run.py                 # all
    python benchmarks/run.py decode          # some
    python benchmarks/run.py decode -- --rounds 3

A benchmark is a file in this folder that prints one JSON object with `measurements` when it is
given `--json`, and fails when what it measures does not compute the right thing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("deepseek-stack", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def benchmarks() -> list[str]:
    """Return the names of the benchmarks, sorted."""
    return sorted(path.stem for path in HERE.glob("[!_]*.py") if path.stem != "run")


def hardware() -> dict[str, object]:
    """Return what the figures depend on: processor, instruction sets, threads, versions, commit."""
    import torch

    model, flags = processor()
    return {
        "processor": model,
        "instruction_sets": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "accelerators": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "load_average": os.getloadavg(),
    }


def processor() -> tuple[str, list[str]]:
    """Return the processor's name and the vector instruction sets that it has."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), []
    fields = dict(
        (key.strip(), value.strip())
        for line in path.read_text().split("\n\n")[0].splitlines()
        for key, _, value in [line.partition(":")]
    )
    wanted = ("avx", "amx", "fma", "f16c", "sve", "asimd", "i8mm", "bf16")
    flags = fields.get("flags", fields.get("Features", "")).split()
    return fields.get("model name", platform.machine()), sorted(
        flag for flag in flags if flag.startswith(wanted)
    )


def version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit, with a mark when files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or None


def run(name: str, arguments: list[str], folder: Path) -> bool:
    """Run one benchmark, write `<name>.json`, and return whether it succeeded."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(f"{name} failed with exit code {done.returncode}: no figures", file=sys.stderr)
        return False
    result = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{name}.py", "--json", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        **json.loads(done.stdout),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path)
    return True


def main() -> int:
    """Run what was asked for; 1 when a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(benchmarks()))
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "benchmarks")
    own, passed = split(sys.argv[1:])
    options = parser.parse_args(own)
    unknown = sorted(set(options.names) - set(benchmarks()))
    if unknown:
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are: {benchmarks()}")
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.names or benchmarks()
    return 0 if all([run(name, passed, options.out) for name in names]) else 1


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and behind `--`."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


if __name__ == "__main__":
    sys.exit(main())
