"""Which kernel runs an operation, with what it costs and why: one table that can be asked.

A backend names its kernel for a case. Ours are the compiled CPU kernels and PyTorch; another (CUDA,
ROCm, an NPU) is one more `Backend` handed to `choose`, and comes first. Loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from deepseek.config import Config
from deepseek.errors import BackendError, describe
from deepseek.ops.cpu import chosen_instruction_set, why_missing

Operation = Literal["linear", "attention", "sampling"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(Config):
    """What is to be computed, as far as the choice depends on it."""

    operation: Operation
    storage: Literal["float32", "bfloat16", "int8", "int4"]
    """Of the weights, or of the keys and values."""
    rows: int = 1
    """Tokens of a step."""
    device: str = "cpu"
    has_gradients: bool = False

    @property
    def text(self) -> str:
        """The case as a person reads it."""
        rows = "one row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.storage}, {rows}" + (", with gradients" if self.has_gradients else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One execution of an operation."""

    name: str
    why: str
    weight_bits: float | None = None
    """Bits read of memory for one weight, scales included: what a step of one row costs."""
    products_per_cycle: int | None = None
    """Multiply-adds that one core can start in a cycle: what a step of many rows costs."""

    @property
    def cost_text(self) -> str:
        """The cost as a person reads it."""
        parts = []
        if self.weight_bits is not None:
            parts.append(f"{self.weight_bits:g} bits a weight")
        if self.products_per_cycle is not None:
            parts.append(f"{self.products_per_cycle} products a cycle")
        return ", ".join(parts)


class Backend(Protocol):
    """A family of kernels for one kind of hardware."""

    def kernel(self, case: Case) -> Kernel | None:
        """Return its kernel for a case, or None when it has none that runs here."""
        ...


_BITS: Mapping[str, float] = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.25, "int4": 5.0}
_PRODUCTS: Mapping[str, Mapping[str, int]] = {
    "plain": {"float32": 4, "bfloat16": 4, "int8": 4, "int4": 4},
    "avx2": {"float32": 16, "bfloat16": 16, "int8": 32, "int4": 32},
    "avxvnni": {"float32": 16, "bfloat16": 16, "int8": 64, "int4": 64},
    "avx512": {"float32": 16, "bfloat16": 16, "int8": 32, "int4": 32},
    "vnni": {"float32": 16, "bfloat16": 16, "int8": 64, "int4": 64},
    "bf16": {"float32": 16, "bfloat16": 32, "int8": 64, "int4": 64},
    "amx": {"float32": 16, "bfloat16": 512, "int8": 1024, "int4": 1024},
    "amx_emulated": {"float32": 16, "bfloat16": 1, "int8": 1, "int4": 1},
}
_HOW: Mapping[str, str] = {
    "float32": "exact, weights packed once",
    "bfloat16": "products in bfloat16, sums in float32, weights packed once",
    "int8": "integer products, a scale per group of 64, rotated",
    "int4": "integer products, a scale and a least value per group of 32",
}


class CompiledBackend:
    """Our own C++ kernels."""

    def kernel(self, case: Case) -> Kernel | None:
        """Return the compiled kernel of a case; None with gradients, off the CPU, or not built."""
        if case.device != "cpu" or case.has_gradients or why_missing() is not None:
            return None
        isa = chosen_instruction_set()
        if case.operation == "sampling":
            return Kernel(
                name=f"deepseek {isa}", why="a row at a time, from the logits of the step"
            )
        if case.operation == "attention":
            how = "pages in place, one softmax over spans of 256 slots merged in order"
            return Kernel(name=f"deepseek {isa}", why=how)
        return Kernel(
            name=f"deepseek {isa}",
            why=_HOW[case.storage],
            weight_bits=_BITS[case.storage],
            products_per_cycle=_PRODUCTS[isa][case.storage],
        )


class TorchBackend:
    """PyTorch: everything that has gradients, and every machine without compiled kernels."""

    def kernel(self, case: Case) -> Kernel | None:
        """Return PyTorch's execution; None for integer weights."""
        if case.storage in ("int8", "int4") and case.operation == "linear":
            return None
        if case.has_gradients:
            why = "the compiled kernels have no gradients"
        elif case.device != "cpu":
            why = "the compiled kernels run on the CPU"
        else:
            why = why_missing() or "asked for"
        return Kernel(name="torch", why=why)


def backends() -> tuple[Backend, ...]:
    """Return the backends of this package, the preferred first."""
    return CompiledBackend(), TorchBackend()


def choose(case: Case, others: Sequence[Backend] = ()) -> Kernel:
    """Return the kernel that runs a case: the first that a backend has, `others` before ours.

    Raises:
        BackendError: nobody has one.
    """
    for backend in (*others, *backends()):
        kernel = backend.kernel(case)
        if kernel is not None:
            return kernel
    must = "one that a backend has a kernel for"
    step = "Install with a C++ compiler"
    raise BackendError(describe("case", case.operation, must, case.text, step))
