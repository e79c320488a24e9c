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

EXAMPLE = "deepseek doctor --json"

EXTRAS = {
    "transformers": "the reference implementation, Auto classes",
    "peft": "LoRA",
    "matplotlib": "plots in reports",
    "lm_eval": "scores checked against lm-eval",
}
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
    rows = [(row["operation"], row["case"], row["execution"], row["why"]) for row in choices]
    out.table("execution", ("operation", "case", "uses", "why"), rows)
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
    limit = Path("/sys/fs/cgroup/cpu.max")
    words = limit.read_text().split() if limit.is_file() else ["max"]
    return "no limit" if words[0] == "max" else f"{int(words[0]) / int(words[1]):g}"


def _cgroup_memory() -> str:
    limit = Path("/sys/fs/cgroup/memory.max")
    word = limit.read_text().strip() if limit.is_file() else "max"
    return "no limit" if word == "max" else size(int(word))


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
    import torch

    from deepseek.ops import attention, linear

    cpu = torch.device("cpu")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows, what in ((1, "one row"), (512, "many rows")):
            chosen = linear.choose(cpu, dtype, num_rows)
            case = f"{str(dtype).removeprefix('torch.')}, {what}"
            why = linear.REASONS[chosen]
            rows.append({"operation": "linear", "case": case, "execution": chosen, "why": why})
    chosen = attention.choose()
    why = "PyTorch's fused kernel; block tables run as masks"
    rows.append({"operation": "attention", "case": "every", "execution": chosen, "why": why})
    step = "decoding step"
    for case, chosen, why in (
        ("grouped-query attention with rope", "flat", "written out, without the modules' overhead"),
        ("experts, latent attention, ALiBi, LoRA", "modules", "no flat step for these yet"),
    ):
        rows.append({"operation": step, "case": case, "execution": chosen, "why": why})
    return rows
