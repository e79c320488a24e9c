"""Which kernel runs an operation, with what it costs and why: one table that can be asked.

A backend names its kernel for a case, and the kernel can be called. Ours are the compiled CPU
kernels and PyTorch; another (CUDA, ROCm, an NPU) is one more `Backend` handed to `choose`, and
comes first; `deepseek.testing.check_backend` proves it. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from deepseek.config import Config
from deepseek.errors import BackendError, describe
from deepseek.ops.cpu import chosen_instruction_set, why_missing
from deepseek.ops.scheme import Form, Group, KVStorage, Storage, scaled_together, stored_bits

if TYPE_CHECKING:
    from torch import Tensor

Operation = Literal["linear", "attention", "sampling"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(Config):
    """What is to be computed, as far as the choice depends on it."""

    operation: Operation
    storage: Storage
    """Of the weights, or of the keys and values."""
    rows: int = 1
    """Tokens of a step; a kernel computes any number of them, this is what it is chosen for."""
    device: str = "cpu"
    """As PyTorch names it."""
    has_gradients: bool = False
    group: Group | None = 32
    """Weights of one scale, integers only; int8 has at least 64 where it is rotated, or None for a
    whole row."""
    keeps_grid: bool = False
    """linear: integer weights keep the grid that a bundle has them on, rotated or not; the engine
    alone packs them."""
    is_causal: bool = True
    """attention: a query sees its own slot and earlier ones only."""
    has_table: bool = False
    """attention: a block table says what is seen."""

    @property
    def text(self) -> str:
        """The case as a person reads it."""
        parts = [self.storage, "one row" if self.rows == 1 else f"{self.rows} rows"]
        if self.group is None:
            parts.insert(1, "by rows")
        elif self.group != 32:
            parts.insert(1, f"groups of {self.group}")
        if self.keeps_grid:
            parts.append("on their own grid")
        if not self.is_causal:
            parts.append("not causal")
        if self.has_table:
            parts.append("with a block table")
        if self.has_gradients:
            parts.append("with gradients")
        if self.device != "cpu":
            parts.append(f"on {self.device}")
        return ", ".join(parts)


class Product(Protocol):
    """The product with one weight, called once a step."""

    def __call__(self, inputs: Tensor, /) -> Tensor:
        """Return `inputs @ weight.T + bias`, float32 [M, N], of inputs float32 [M, K]; M may change
        from call to call."""
        ...


class Linear(Protocol):
    """The linear product: a weight is packed once."""

    def __call__(self, weight: Tensor, bias: Tensor | None = None, /) -> Product:
        """Return the product with a weight float32 [N, K] and a bias float32 [N]."""
        ...


class Attention(Protocol):
    """Attention of the newest slots of each row over all of its slots."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, /) -> Tensor:
        """Return softmax(q k^T / sqrt(dim)) v, float32 [B, heads, T, dim].

        Args:
            queries: float32 [B, heads, T, dim], of the last T slots.
            keys, values: float32 [B, KV heads, S, dim]; query head h reads KV head
                `h // (heads // KV heads)`.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One execution of an operation.

    What it is called by takes float32 tensors on the case's device, of any strides, and leaves them
    as they are. It computes what `linear_reference` or `attention_reference` says, as closely as
    the storage allows; of no rows it returns none, or refuses them by a ValueError.
    """

    name: str
    why: str
    weight_bits: float | None = None
    """Bits read of memory for one weight, scales included: what a step of one row costs."""
    products_per_cycle: int | None = None
    """Multiply-adds that one core can start in a cycle: what a step of many rows costs."""
    is_batch_invariant: bool = False
    """A row's result does not depend on its companions, bit by bit."""
    linear: Linear | None = dataclasses.field(default=None, compare=False, repr=False)
    """By which a kernel of the linear product is called."""
    attention: Attention | None = dataclasses.field(default=None, compare=False, repr=False)
    """By which a kernel of attention is called."""

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
_HOW_ON_GRID: Mapping[str, str] = {
    "int8": "integer products, the scales of the bundle, inputs {scaled}",
    "int4": "integer products, scales and zero points of the bundle, inputs {scaled}",
}
_HOW: Mapping[str, str] = {
    "float32": "exact, weights packed once",
    "bfloat16": "products in bfloat16, sums in float32, weights packed once",
    "int8": "integer products, scaled {scaled}, rotated",
    "int4": "integer products, scale and least value {scaled}",
}


def _scaled(group: int | None) -> str:
    return "by rows" if group is None else f"in groups of {group}"


class CompiledBackend:
    """Our own C++ kernels."""

    def kernel(self, case: Case) -> Kernel | None:
        """Return the compiled kernel of a case; None off the CPU, or not built, and with gradients
        but for attention by a table.

        What executes a block table is named only: `deepseek.ops.attention.attention` calls it.
        """
        if case.device != "cpu" or why_missing() is not None:
            return None
        isa = chosen_instruction_set()
        if case.has_table and case.storage in ("float32", "bfloat16"):
            why = "listed blocks alone, gradients too; rows of a few queries are masked"
            return Kernel(name=f"deepseek {isa}", why=why)
        if case.has_gradients:
            return None
        if case.operation == "linear" and case.keeps_grid:
            return Kernel(
                name=f"deepseek {isa}",
                why=_HOW_ON_GRID[case.storage].format(scaled=_scaled(case.group)),
                weight_bits=Form(case.storage, case.group).bits,
                products_per_cycle=_PRODUCTS[isa][case.storage],
                is_batch_invariant=True,
            )
        if case.operation == "linear":
            return Kernel(
                name=f"deepseek {isa}",
                why=_HOW[case.storage].format(
                    scaled=_scaled(scaled_together(case.storage, case.group))
                ),
                weight_bits=stored_bits(case.storage, case.group),
                products_per_cycle=_PRODUCTS[isa][case.storage],
                is_batch_invariant=True,
                linear=functools.partial(_compiled_linear, case, isa),
            )
        if case.operation == "sampling":
            why = "a row at a time, from the logits of the step"
            return Kernel(name=f"deepseek {isa}", why=why, is_batch_invariant=True)
        if case.storage == "int4" or not case.is_causal or case.has_table:
            return None
        return Kernel(
            name=f"deepseek {isa}",
            why="pages in place, one softmax over spans of 128 slots merged in order",
            is_batch_invariant=True,
            attention=functools.partial(_compiled_attention, case.storage, isa),
        )


def _compiled_linear(case: Case, isa: str, weight: Tensor, bias: Tensor | None = None) -> Product:
    from deepseek.ops.calls import compiled_linear

    return compiled_linear(weight, bias, storage=case.storage, group=case.group, isa=isa)


def _compiled_attention(
    storage: KVStorage, isa: str, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    from deepseek.ops.calls import compiled_attention

    return compiled_attention(queries, keys, values, storage=storage, isa=isa)


_TABLES: Mapping[str, tuple[str, str]] = {
    "cpu": ("torch gathered", "listed blocks are gathered where they are few, masked elsewhere"),
    "cuda": ("torch flex", "FlexAttention goes through listed blocks alone; never run by us"),
}


class TorchBackend:
    """PyTorch: everything that has gradients, and every machine without compiled kernels."""

    def kernel(self, case: Case) -> Kernel | None:
        """Return PyTorch's execution; None for integer weights, keys and values.

        What executes a block table is named only: `deepseek.ops.attention.attention` calls it.
        """
        if case.storage in ("int8", "int4") and case.operation != "sampling":
            return None
        kernel = Kernel(name="torch", why=_why_torch(case))
        if case.operation == "linear":
            return dataclasses.replace(kernel, linear=functools.partial(_torch_linear, case))
        if case.operation == "attention" and case.has_table:
            name, why = _TABLES["cuda" if case.device.startswith("cuda") else "cpu"]
            return dataclasses.replace(kernel, name=name, why=why)
        if case.operation == "attention":
            run = functools.partial(_torch_attention, case)
            return dataclasses.replace(kernel, attention=run)
        return kernel


def _why_torch(case: Case) -> str:
    if case.has_gradients and case.operation == "attention":
        return "PyTorch's, and our kernels within it where rows are long"
    if case.has_gradients:
        return "the compiled kernels have no gradients"
    if case.device != "cpu":
        return "the compiled kernels run on the CPU"
    if not case.is_causal:
        return "the compiled kernels are causal"
    return why_missing() or "asked for"


def _torch_linear(case: Case, weight: Tensor, bias: Tensor | None = None) -> Product:
    from deepseek.ops.calls import torch_linear

    return torch_linear(weight, bias, storage=case.storage)


def _torch_attention(case: Case, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from deepseek.ops.calls import torch_attention

    return torch_attention(queries, keys, values, storage=case.storage, is_causal=case.is_causal)


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
