"""What an engine takes of memory, known before a weight is read. Loads no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from deepseek.generate.engine import (
    MAX_STEP_TOKENS,
    PAGE_SIZE,
    Rows,
    Weights,
    forms_held,
    needed_weight,
)
from deepseek.generate.flat import decoder_program
from deepseek.graph import Program, plan_memory
from deepseek.models.config import DecoderConfig
from deepseek.ops.grid import GridSource
from deepseek.ops.scheme import Form, Scheme, cached_bytes

_MIB = 2**20
_ARENA_BYTES, _ARENA_SLACK_BYTES = 64 * _MIB, 2 * _MIB
"""Weights lie in arenas, each filled but for a last huge page."""
_PANEL = 48
"""Rows that are packed together; the last ones are padded."""
_HEAD_DIM_MULTIPLE = 16
_THREAD_BYTES = 2 * _MIB
"""Scratch of a thread, its stack included."""
_SPAN_TOKENS = 128
"""Cached tokens that one unit of a decoding step's attention sees."""
_LOGIT_COPIES = 3
"""The output, and what choosing a token makes of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that an engine takes beside the process that it is in; each is an upper bound."""

    weights_bytes: int
    """Packed."""
    states_bytes: int
    """Of a step: activations, prepared inputs, scratch of threads and attention."""
    cache_bytes: int
    """Of keys and values: all rows, each as long as the context."""
    logits_bytes: int
    loading_bytes: int
    """Most at once while weights are packed: those that are, and one as the file has it."""

    @property
    def running_bytes(self) -> int:
        """Bytes while it generates with all rows full."""
        return self.weights_bytes + self.states_bytes + self.cache_bytes + self.logits_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes at once, of loading and running."""
        return max(self.loading_bytes, self.running_bytes)


def engine_footprint(
    config: DecoderConfig,
    weights: Weights,
    scheme: Scheme,
    *,
    rows: int,
    context: int,
    threads: int,
) -> Footprint:
    """Return what an engine of a decoder takes, which sees all tokens before each.

    Args:
        config: of a decoder that has a flat program.
        weights: their shapes are looked at, and where they are kept as stored their scales.
        scheme: how they are held.
        rows: texts that are generated together.
        context: most tokens of a row.
        threads: that compute.

    Raises:
        BackendError: a weight is missing.
        ConfigError: weights as they are stored are on different grids in one product.
    """
    program = decoder_program(config)
    forms = forms_held(program, weights, scheme)
    sources = {name: needed_weight(weights, name) for name in forms}
    shapes = {name: source.shape for name, source in sources.items()}
    packed = loading = 0
    for name, form in forms.items():  # in the order in which they are packed
        packed += _held_bytes(shapes[name], form)
        loading = max(loading, packed + _source_bytes(sources[name]))
    slack = (packed // _ARENA_BYTES + 1) * _ARENA_SLACK_BYTES
    shape = program.shape
    pages = rows * -(-context // PAGE_SIZE)
    token_bytes = cached_bytes(scheme.kv, _padded(shape.head_dim, _HEAD_DIM_MULTIPLE))
    return Footprint(
        weights_bytes=packed + slack,
        states_bytes=_states_bytes(program, shapes, forms, threads)
        + _partial_bytes(program, rows, context),
        cache_bytes=pages * PAGE_SIZE * shape.num_layers * shape.num_kv_heads * token_bytes,
        logits_bytes=_LOGIT_COPIES * rows * shape.vocab_size * 4,
        loading_bytes=loading + slack,
    )


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _held_bytes(shape: tuple[int, ...], form: Form) -> int:
    rows, width = shape
    scales = 4 if form.storage == "int8" else 0  # of a whole row, or what pads an odd number
    return _padded(rows, _PANEL) * (math.ceil(form.width(width) * form.bits / 8) + scales)


def _source_bytes(source: Rows | GridSource) -> int:
    count = math.prod(source.shape)
    if isinstance(source, Rows):
        return count * (4 if source.dtype == "float32" else 2)
    return 3 * count  # the words of the file, a byte for each code, and a copy in order


def _states_bytes(
    program: Program,
    shapes: Mapping[str, tuple[int, ...]],
    forms: Mapping[str, Form],
    threads: int,
) -> int:
    _, floats = plan_memory(program.instructions, program.widths)
    active, expert_floats = 1, 0
    for item in program.instructions:
        if item.op == "experts":
            active = max(active, item.num_active)
            expert_floats = max(expert_floats, item.num_active * sum(shapes[item.weights[2]]))
    inputs = max(_input_bytes(shapes[name][1], form) for name, form in forms.items())
    per_token = 4 * (floats + expert_floats + program.shape.head_dim) + active * inputs
    return MAX_STEP_TOKENS * per_token + threads * _THREAD_BYTES


def _input_bytes(width: int, form: Form) -> int:
    """Return the bytes of a token's inputs of a product, prepared."""
    held = form.width(width)
    if form.storage in ("float32", "bfloat16"):
        return 4 * held
    return held + 8 * -(-held // (form.group or held))


def _partial_bytes(program: Program, rows: int, context: int) -> int:
    """Return the bytes of what units of attention found, before it is merged."""
    units = rows * program.shape.num_heads * (context // _SPAN_TOKENS + 1)
    return 6 * units * (_padded(program.shape.head_dim, _HEAD_DIM_MULTIPLE) + 2)
