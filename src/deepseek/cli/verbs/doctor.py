"""What this machine has, which execution each operation uses here, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from deepseek.cli.output import Output, size
from deepseek.errors import BackendError
from deepseek.ops.cgroup import cgroup_cores, cgroup_memory
from deepseek.ops.choice import Case, Kernel, choose

EXAMPLE = "deepseek doctor --json"

EXTRAS = {
    "transformers": "the reference implementation, Auto classes",
    "peft": "LoRA",
    "matplotlib": "plots in reports",
    "lm_eval": "scores checked against lm-eval",
}
CASES = (
    *(
        Case(operation="linear", storage=storage, rows=rows)
        for storage in ("float32", "bfloat16", "int8", "int4")
        for rows in (1, 512)
    ),
    Case(operation="linear", storage="int8", group=64, keeps_grid=True),
    Case(operation="linear", storage="int4", keeps_grid=True),
    Case(operation="attention", storage="bfloat16", rows=1),
    Case(operation="attention", storage="int8", rows=1),
    Case(operation="attention", storage="bfloat16", rows=512),
    Case(operation="attention", storage="bfloat16", rows=512, has_gradients=True),
    *(
        Case(
            operation="attention",
            storage="bfloat16",
            rows=512,
            has_gradients=True,
            has_table=True,
            device=device,
        )
        for device in ("cpu", "cuda")
    ),
    Case(operation="sampling", storage="float32", rows=1),
)
"""What `doctor` asks about."""
CPU_FLAGS = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
    "bf16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`deepseek doctor` has no options of its own."""


def run(args: argparse.Namespace, out: Output) -> int:
    """Show machine, software and choices."""
    machine, software, choices = machine_facts(), software_facts(), choice_facts()
    out.table("machine", ("", ""), [(name, shown(value)) for name, value in machine.items()])
    out.say()
    out.table("software", ("", ""), [(name, shown(value)) for name, value in software.items()])
    out.say()
    rows = [tuple(row.values()) for row in choices]
    out.table("execution", ("operation", "case", "uses", "cost of a row", "why"), rows)
    return out.finish({"machine": machine, "software": software, "execution": choices})


def shown(value: object) -> str:
    """Return a fact as a person reads it."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def machine_facts() -> dict[str, object]:
    """Return processor, cores that may be used, memory and room in the store."""
    from deepseek.hub.store import store_folder

    model, flags = _cpu()
    store = store_folder()
    present = next(path for path in (store, *store.parents) if path.exists())
    return {
        "processor": model,
        "instructions": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cgroup_cores": _cgroup_cores(),
        "memory": _memory(),
        "cgroup_memory": _cgroup_memory(),
        "store": str(store),
        "store_free": size(shutil.disk_usage(present).free),
        "system": platform.platform(),
    }


def _cpu() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine(), set()
    model, flags = platform.machine(), set()
    for line in info.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = set(value.split())
    return model, flags


def _memory() -> str:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return "unknown"
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return f"{size(total)}, {size(free)} free"


def _cgroup_cores() -> str:
    cores = cgroup_cores()
    return "no limit" if cores is None else f"{cores:g}"


def _cgroup_memory() -> str:
    found = cgroup_memory()
    return "no limit" if found is None else f"{size(found[0])}, {size(found[1])} free"


def software_facts() -> dict[str, object]:
    """Return versions of what we stand on, and of the optional packages that are installed."""
    facts: dict[str, object] = {"python": platform.python_version()}
    for package in ("deepseek-stack", "torch", "tokenizers", "safetensors", "gguf"):
        facts[package] = importlib.metadata.version(package)
    for package, purpose in EXTRAS.items():
        found = importlib.util.find_spec(package) is not None
        version = (
            importlib.metadata.version(package.replace("_", "-")) if found else "not installed"
        )
        facts[package] = f"{version} ({purpose})"
    return facts


def choice_facts() -> list[dict[str, str]]:
    """Return, for each operation and case, the execution that is used here and the reason."""
    rows = []
    for case in CASES:
        try:
            chosen = choose(case)
        except BackendError as error:
            chosen = Kernel(name="none", why=str(error))
        rows.append(
            {
                "operation": case.operation,
                "case": case.text,
                "execution": chosen.name,
                "cost": chosen.cost_text,
                "why": chosen.why,
            }
        )
    return rows
