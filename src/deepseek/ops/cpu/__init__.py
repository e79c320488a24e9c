"""Our own kernels for the CPU: whether they are here, and which of them this machine runs.

Loads no torch. The C++ beside this file, in `ops/linear/cpu`, `ops/attention/cpu` and
`ops/sampling/cpu` is compiled once for every instruction set; the choice is made at run time.
"""

from __future__ import annotations

import importlib
import math
import os
from types import ModuleType

from deepseek.errors import BackendError, ConfigError, describe
from deepseek.ops.cgroup import cgroup_cores

ISA_VARIABLE = "DEEPSEEK_ISA"
"""Environment variable that forces an instruction set, for tests and comparisons."""


def kernels() -> ModuleType:
    """Return the compiled kernels.

    Raises:
        BackendError: they were not built.
    """
    try:
        return importlib.import_module("deepseek.ops.cpu._cpu")
    except ImportError as error:
        step = "Install with a C++ compiler (g++ 11 or clang 14) to build them"
        must = "built to be used"
        raise BackendError(describe("kernels", "deepseek.ops", must, str(error), step)) from error


def why_missing() -> str | None:
    """Return why there are no compiled kernels, or None when they are here."""
    try:
        kernels()
    except BackendError as error:
        return str(error)
    return None


def instruction_sets() -> list[str]:
    """Return the instruction sets that were built and that this processor runs, best last."""
    return list(kernels().usable_isas())


def emulated_instruction_sets() -> list[str]:
    """Return instruction sets that this machine can run emulated: for tests, never chosen."""
    return list(kernels().emulated_isas())


def chosen_instruction_set() -> str:
    """Return the instruction set whose kernels run: the best one, or what `DEEPSEEK_ISA` names.

    Raises:
        ConfigError: it names one that cannot run here.
        BackendError: the kernels were not built.
    """
    usable = instruction_sets()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return usable[-1]
    if wanted not in usable and wanted not in emulated_instruction_sets():
        raise ConfigError(describe(ISA_VARIABLE, "the environment", f"one of {usable}", wanted))
    return wanted


def packed_form() -> str:
    """Return what the bytes of a packed weight depend on, beside the weight and its scheme."""
    return f"layout {kernels().layout}, {chosen_instruction_set()}"


def default_threads() -> int:
    """Return how many threads compute: the cores this process may use, within its cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_cores()
    return max(1, min(cores or 1, math.ceil(quota) if quota is not None else cores or 1))
