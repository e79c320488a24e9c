"""Instructions, the program they make, and the static plan of its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

Op = Literal["embed", "linear", "swiglu", "attend", "experts", "copy", "layer_norm"]

Activation = Literal["gelu", "gelu_new", "relu", "tanh"]
"""By the names that Hugging Face configs have for them."""

RowSet = Literal["all", "pick", "picked"]
"""Rows of an instruction: those of all tokens; of all tokens' those whose logits were asked for,
side by side in the output; or rows that were picked so before."""

LOGITS = "logits"
"""The output that is no buffer of the plan: the caller owns it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One operation on all rows of a step. Fused around it: the norm and quantization of its input,
    bias, residual."""

    op: Op
    output: str
    """Buffer that is written."""
    input: str | None = None
    """Buffer that is read; None for tokens."""
    weights: tuple[str, ...] = ()
    """linear: side by side in the output; swiglu: gate and up; experts: gate, up and down of each
    in turn."""
    norm: str | None = None
    """Weight of the RMS norm of the input; layer_norm: its weight."""
    bias: str | None = None
    """layer_norm: its bias."""
    positions: str | None = None
    types: str | None = None
    """embed: tables whose row of the token's position, and of its type, is added."""
    activation: Activation | None = None
    """linear: of the outputs."""
    adds: bool = False
    """Add to the output in place of setting it."""
    rows: RowSet = "all"
    is_head: bool = False
    """The first of the instructions that make the output of the last states."""
    layer: int = 0
    """attend: layer of the cache."""
    q_norm: str | None = None
    k_norm: str | None = None
    window: int | None = None
    """attend: slots a query sees, its own included; None for all."""
    is_exact: bool = False
    """linear: the weights stay float32 in every scheme, as a router's do."""
    closes_below: float | None = None
    """linear: the outputs x become gates, 2 sigmoid(x), and 0 below this; None for as they are."""
    gates: str | None = None
    """attend: buffer of a factor for each query head; a head whose factor is 0 is not computed."""
    routes: str | None = None
    """experts: buffer of the router's logits, a value for each expert."""
    balance: str | None = None
    """experts: vector added to the scores to choose by; the scores are sigmoids then, else a
    softmax."""
    num_active: int = 0
    """experts: experts of a token."""
    num_groups: int = 1
    num_active_groups: int = 1
    """experts: groups of neighbouring experts, and how many of them a token may use."""
    normalizes: bool = False
    """experts: the chosen weights are divided by their sum."""
    scale: float = 1.0
    """experts: factor on the chosen weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramShape:
    """What all instructions share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int
    norm_eps: float
    inverse_frequencies: tuple[float, ...]
    """Angle per position of each channel pair of a head; empty where heads are not rotated."""
    rope_factor: float = 1.0
    """Factor on cosines and sines."""
    num_outputs: int | None = None
    """Values of a token's output; None for the vocabulary."""
    is_causal: bool = True
    """A token sees those before it; or else all of its row, which is one step's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A whole model, ready to be given its weights."""

    shape: ProgramShape
    widths: Mapping[str, int]
    """Values of a row of each buffer."""
    instructions: tuple[Instruction, ...]

    def text(self) -> str:
        """Return the program as a person reads it, one instruction a line."""
        lines = []
        for number, item in enumerate(self.instructions):
            source = item.input or "tokens"
            source = f"norm({source})" if item.norm else source
            sign = "+=" if item.adds else "="
            weights = ", ".join(item.weights)
            lines.append(f"{number:4} {item.output} {sign} {item.op}({source}; {weights})")
        return "\n".join(lines)


def plan_memory(
    instructions: Sequence[Instruction], widths: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """Return the offset of each buffer in a row of memory, and the length of the row.

    A value is alive from the instruction that sets its buffer to the last that touches it before
    the buffer is set again; buffers whose values are ever alive together never overlap. The widest
    are placed first, each as low as it fits.
    """
    lives: dict[str, list[tuple[int, int]]] = {}
    for place, item in enumerate(instructions):
        read = ((name, False) for name in (item.input, item.gates, item.routes))
        touched = (*read, (item.output, not item.adds))
        for name, begins in touched:
            if name is None or name == LOGITS:
                continue
            spans = lives.setdefault(name, [])
            if begins or not spans:
                spans.append((place, place))
            else:
                spans[-1] = (spans[-1][0], place)
    offsets: dict[str, int] = {}
    for name in sorted(lives, key=lambda name: (-widths[name], name)):
        taken = sorted(
            (offsets[other], offsets[other] + widths[other])
            for other in offsets
            if _meet(lives[name], lives[other])
        )
        offset = 0
        for start, stop in taken:
            if offset + widths[name] <= start:
                break
            offset = max(offset, stop)
        offsets[name] = offset
    total = max((offsets[name] + widths[name] for name in offsets), default=0)
    return offsets, total


def _meet(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
    return any(a[0] <= b[1] and b[0] <= a[1] for a in one for b in other)
