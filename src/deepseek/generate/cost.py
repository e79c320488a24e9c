"""What a step of a program costs, and which kernel runs each of its operations. Loads no torch."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from deepseek.errors import BackendError, describe
from deepseek.graph import Instruction, Program
from deepseek.graph.program import LOGITS
from deepseek.ops.choice import Backend, Case, Kernel, choose
from deepseek.ops.scheme import Form, Scheme, Storage, cached_bytes

Shapes = Mapping[str, tuple[int, ...]]
"""Of weights, by the decoder's own names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationCost:
    """What instructions that are alike cost in a step, all of them together."""

    name: str
    """qkv, gates, attention, o, swiglu, down, router, experts or head."""
    count: int
    """Instructions that are alike."""
    shape: tuple[int, ...]
    """[out, in] of all weights of one instruction side by side; experts: [experts, out, in];
    attention: [heads, KV heads, channels of a head]."""
    storage: Storage
    """Of the weights, or of keys and values."""
    kernel: Kernel
    weight_bytes: int
    """Read of memory."""
    cache_bytes: int
    """Of cached keys and values, read of memory."""
    products: int
    """Multiply-adds."""

    def to_dict(self) -> dict[str, object]:
        """Return the cost as JSON-ready values."""
        return {
            "operation": self.name,
            "count": self.count,
            "shape": list(self.shape),
            "storage": self.storage,
            "kernel": self.kernel.name,
            "why": self.kernel.why,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "products": self.products,
        }


class _Kind(NamedTuple):
    """What makes instructions alike."""

    name: str
    op: str
    matrices: tuple[tuple[int, ...], ...]
    form: Form
    window: int | None
    num_active: int


class _Step(NamedTuple):
    program: Program
    scheme: Scheme
    rows: int
    context: int
    others: Sequence[Backend]

    def kernel(self, kind: _Kind) -> Kernel:
        """Return the kernel of an operation."""
        operation = "attention" if kind.op == "attend" else "linear"
        case = Case(operation=operation, storage=kind.form.storage, rows=self.rows)
        if kind.form.storage in ("int8", "int4") and operation == "linear":
            case = case.replace(group=kind.form.group, keeps_grid=self.scheme.as_stored)
        return choose(case, self.others)


def cost_of_step(
    program: Program,
    shapes: Shapes,
    scheme: Scheme,
    *,
    forms: Mapping[str, Form] | None = None,
    rows: int = 1,
    context: int = 1,
    others: Sequence[Backend] = (),
) -> list[OperationCost]:
    """Return what a step of some rows costs, each with one new token whose logits are asked for.

    What is small beside these is left out: the look-up of embeddings, norms, activations. Experts
    are counted as if no two tokens shared one, as long as there are enough.

    Args:
        program: of the decoder.
        shapes: of its weights.
        scheme: how they are stored.
        forms: of its weights one by one, where the scheme is `as_stored`.
        rows: of the step.
        context: tokens that each row sees, its new one included.
        others: backends that are asked before ours.

    Raises:
        BackendError: a weight is missing, or no backend has a kernel.
    """
    alike = Counter(
        _kind(item, shapes, scheme, forms or {})
        for item in program.instructions
        if item.op == "attend" or (item.weights and item.op != "embed")
    )
    step = _Step(program, scheme, rows, context, others)
    return [_cost(step, kind, count) for kind, count in alike.items()]


_OUTPUTS = {"qkv": "qkv", "gates": "gates", "routes": "router", LOGITS: "head"}
_INPUTS = {"attended": "o", "hidden": "down"}


def _kind(item: Instruction, shapes: Shapes, scheme: Scheme, forms: Mapping[str, Form]) -> _Kind:
    name = {"attend": "attention"}.get(item.op, item.op)
    if item.op == "linear":
        name = _OUTPUTS.get(item.output) or _INPUTS.get(item.input or "", name)
    if item.op == "attend":
        form = Form(scheme.kv)
    elif item.is_exact:
        form = Form("float32")
    elif scheme.as_stored:
        form = forms[item.weights[0]]
    else:
        form = scheme.form_of(scheme.head_storage if item.output == LOGITS else scheme.weights)
    matrices = tuple(_shape(shapes, weight) for weight in item.weights)
    return _Kind(name, item.op, matrices, form, item.window, item.num_active)


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise BackendError(describe(f"weight {name!r}", "the model", "there", "no such weight"))
    return shapes[name]


def _cost(step: _Step, kind: _Kind, count: int) -> OperationCost:
    kernel = step.kernel(kind)
    if kind.op == "attend":
        return _attention_cost(step, kind, kernel, count)
    bits = kernel.weight_bits or kind.form.bits
    matrices, used, per_row = kind.matrices, 1, 1
    if kind.op == "experts":
        matrices, per_row = kind.matrices[:3], kind.num_active
        used = min(len(kind.matrices) // 3, step.rows * per_row)
    stored = sum(height * kind.form.width(width) for height, width in matrices)
    scales = 0 if kind.form.group else 2 * sum(height for height, _ in matrices)
    return OperationCost(
        name=kind.name,
        count=count,
        shape=_whole_shape(kind),
        storage=kind.form.storage,
        kernel=kernel,
        weight_bytes=count * used * (math.ceil(stored * bits / 8) + scales),
        cache_bytes=0,
        products=count * step.rows * per_row * sum(map(math.prod, matrices)),
    )


def _whole_shape(kind: _Kind) -> tuple[int, ...]:
    """Return the shape of all weights of an instruction side by side."""
    if kind.op != "experts":
        return sum(height for height, _ in kind.matrices), kind.matrices[0][1]
    width = kind.matrices[0][1]
    return len(kind.matrices) // 3, sum(map(math.prod, kind.matrices[:3])) // width, width


def _attention_cost(step: _Step, kind: _Kind, kernel: Kernel, count: int) -> OperationCost:
    shape, scheme = step.program.shape, step.scheme
    seen = min(kind.window or step.context, step.context)
    token_bytes = shape.num_kv_heads * cached_bytes(scheme.kv, shape.head_dim)
    return OperationCost(
        name=kind.name,
        count=count,
        shape=(shape.num_heads, shape.num_kv_heads, shape.head_dim),
        storage=kind.form.storage,
        kernel=kernel,
        weight_bytes=0,
        cache_bytes=count * step.rows * seen * token_bytes,
        products=count * step.rows * seen * shape.num_heads * shape.head_dim * 2,
    )
