"""The engine: a decoder's program with its packed weights, run by our kernels. Loads no torch."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

import numpy as np

from deepseek.errors import BackendError, CapacityError, ConfigError, describe
from deepseek.generate.adapters import EngineAdapter, pack_adapter
from deepseek.generate.flat import decoder_program, why_mixed, why_not_flat
from deepseek.graph import Instruction, Program, ProgramShape, plan_memory
from deepseek.graph.program import LOGITS
from deepseek.models.config import DecoderConfig
from deepseek.ops.cpu import chosen_instruction_set, default_threads, kernels
from deepseek.ops.grid import GridSource, form_of, halves_of
from deepseek.ops.head_count import HeadCount
from deepseek.ops.low_rank import LowRankUpdate
from deepseek.ops.routing import Routing
from deepseek.ops.scheme import Form, Scheme, Storage

if TYPE_CHECKING:
    from deepseek.data import Tokenizer

MAX_STEP_TOKENS = 512
"""Most tokens of one step: bounds the memory of activations."""
PAGE_SIZE = 64
MAX_THREADS = 256
"""Threads wait for one another hundreds of times a step: more would only spin."""


class Rows(NamedTuple):
    """A weight in memory, read once when it is packed."""

    address: int
    dtype: str
    """float32, bfloat16 or float16."""
    shape: tuple[int, ...]
    stride_bytes: int
    """From one row to the next."""
    owner: object
    """What keeps the memory alive."""


Weights = Callable[[str], "Rows | GridSource | None"]
"""Gives a weight by the decoder's own name, as rows of numbers or on a grid; None where there is
none (a bias, mostly)."""


class PackedBytes(Protocol):
    """A weight as an engine of the same scheme and instruction set has packed it, on the disk."""

    def read_into(self, room: memoryview) -> None:
        """Fill a room of its very length.

        Raises:
            FormatError: it has another length, or cannot be read.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """A decoder ready to run without torch. Make it by `build_engine`; `generate` takes it in place
    of a model.
    """

    config: DecoderConfig
    scheme: Scheme
    program: Program
    instruction_set: str
    native: Any
    """The compiled program with its weights."""
    tokenizer: Tokenizer | None = None
    bundle: object | None = None
    was_packed: bool = False
    """Whether its weights were packed before, and only read."""
    routing: Routing | None = None
    """Which blocks attention sees; None for all."""
    adapters: dict[str, EngineAdapter] = dataclasses.field(default_factory=dict, init=False)
    """Those that are loaded, by name."""

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.native.threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.native.weight_bytes

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapters in memory: those that are loaded, and those that were dropped and
        that somebody still holds."""
        return self.native.adapter_bytes

    @property
    def can_copy_pages(self) -> bool:
        """Whether a text may go on, to the bit, from any token of a copied page: not where
        attention is routed, for what a page's groups have chosen is kept with it."""
        return self.routing is None

    @property
    def head_count(self) -> HeadCount:
        """Attention heads of all tokens and layers since it was made: those that had a gate, and of
        them those that were not computed. Without gates both are 0."""
        total, closed = self.native.gated_heads
        return HeadCount(total, closed)

    def packed_parts(self) -> list[tuple[str, memoryview]]:
        """Return the packed weights in place: what `build_engine` takes as `packed`."""
        parts = []
        for place, name in enumerate(matrices_of(self.program.instructions)):
            parts.append((name, _packed_view(self.native, place)))
        return parts

    def new_pages(self, num_pages: int) -> Any:
        """Return memory for `num_pages` pages of 64 tokens, in every layer.

        Raises:
            CapacityError: there is not enough memory.
        """
        try:
            return kernels().KvPages(self.scheme.kv, self.native, num_pages)
        except MemoryError as error:
            must = "small enough for memory"
            step = "Use fewer rows or a shorter context"
            got = f"{num_pages} pages of {PAGE_SIZE} tokens"
            raise CapacityError(describe("size", "the cache", must, got, step)) from error

    def step(
        self,
        pages: Any,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
        page_table: np.ndarray,
        selected: Sequence[int] | np.ndarray,
        adapters: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Append tokens to their rows' pages and return logits float32 [selected, vocab].

        One step takes tokens of any number of rows: whole prompts, chunks of them and single tokens
        together, of any adapters. A token's result depends on its own row only, bit by bit.

        Args:
            pages: of `new_pages`.
            tokens: ids, those of a row side by side and in order; at most `MAX_STEP_TOKENS`.
            positions: of each token; a row's pages must hold every position before it.
            rows: row of `page_table` of each token.
            page_table: int32 [rows, pages per row].
            selected: places in `tokens` whose logits are wanted.
            adapters: the number of each token's adapter, `NO_ADAPTER` for none; None for none at
                all. What a row's pages hold depends on it.

        Raises:
            ConfigError: numbers that do not fit together; nothing was computed.
        """
        table = np.ascontiguousarray(page_table, np.int32)
        arrays = (_int32(tokens), _int32(positions), _int32(rows), table, _int32(selected))
        numbers = None if adapters is None else _int32(adapters)
        return self._run(pages, arrays, numbers, self.config.vocab_size, states=False)

    def states(
        self,
        pages: Any,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
        page_table: np.ndarray,
        selected: Sequence[int] | np.ndarray,
    ) -> np.ndarray:
        """Append tokens to their rows' pages and return the states that the head would read, which
        the last norm has made: float32 [selected, hidden].

        Args and raises: as `step`.
        """
        table = np.ascontiguousarray(page_table, np.int32)
        arrays = (_int32(tokens), _int32(positions), _int32(rows), table, _int32(selected))
        return self._run(pages, arrays, None, self.config.hidden_size, states=True)

    def _run(
        self,
        pages: Any,
        arrays: tuple[np.ndarray, ...],
        adapters: np.ndarray | None,
        width: int,
        *,
        states: bool,
    ) -> np.ndarray:
        output = np.empty((len(arrays[-1]), width), np.float32)
        try:
            self.native.run(pages, *arrays, output, adapters, states=states)
        except ValueError as error:
            raise ConfigError(describe("step", "Engine", "consistent", str(error))) from error
        return output

    def add_adapter(self, name: str, updates: Mapping[str, LowRankUpdate]) -> EngineAdapter:
        """Load an adapter under a name, from any thread, while steps run.

        Args:
            name: one that no loaded adapter has.
            updates: what each adapted weight's product gains, by the decoder's own names.

        Raises:
            ConfigError: the name is taken, a weight is not there or takes no adapter (the
                embedding, the head, routed experts), or a shape does not fit.
            CapacityError: there is not enough memory.
        """
        adapter = pack_adapter(self.native, self.program, name, updates)
        if self.adapters.setdefault(name, adapter) is not adapter:
            step = "Drop that one first"
            raise ConfigError(describe("adapter", "Engine", "loaded under a new name", name, step))
        return adapter

    def drop_adapter(self, name: str) -> None:
        """Forget the adapter of a name. Who holds it may use it further; then its memory is given
        back.

        Raises:
            ConfigError: there is none of this name.
        """
        if self.adapters.pop(name, None) is None:
            raise ConfigError(describe("adapter", "Engine", "one that is loaded", name))

    def turn_back(self, pages: Any, numbers: Sequence[int] | np.ndarray, positions: int) -> None:
        """Move full pages to positions that lie `positions` earlier.

        Args:
            pages: of `new_pages`.
            numbers: of the pages, as in a page table.
            positions: a multiple of the page size, so that a page stays one.

        Raises:
            ConfigError: numbers that do not fit together; nothing was changed.
        """
        try:
            self.native.turn_back(pages, _int32(numbers), positions)
        except ValueError as error:
            raise ConfigError(describe("turn_back", "Engine", "consistent", str(error))) from error


def checked_threads(threads: int | None) -> int:
    """Return the threads to compute with, by default the cores that this process may use.

    Raises:
        ConfigError: fewer than 1, or more than `MAX_THREADS`.
    """
    threads = default_threads() if threads is None else threads
    if not 1 <= threads <= MAX_THREADS:
        raise ConfigError(describe("threads", "Engine", f"from 1 to {MAX_THREADS}", threads))
    return threads


def _int32(values: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.int32)


def build_engine(
    config: DecoderConfig,
    weights: Weights,
    scheme: Scheme,
    *,
    tokenizer: Tokenizer | None = None,
    bundle: object | None = None,
    threads: int | None = None,
    instruction_set: str | None = None,
    progress: Callable[[float], None] | None = None,
    packed: Mapping[str, PackedBytes] | None = None,
    routing: Routing | None = None,
) -> Engine:
    """Return an engine; every weight is read once and packed.

    Args:
        config: of the decoder.
        weights: its weights by name; one on a grid is read once, when it is packed.
        scheme: how they are stored. One on a grid keeps it where the scheme says `as_stored`, and
            is rounded anew where it does not.
        tokenizer, bundle: handed on.
        threads: None for the cores this process may use.
        instruction_set: None for the best one here, or what `DEEPSEEK_ISA` says.
        progress: called with the share of weights that are packed.
        packed: `packed_parts` of an engine of the same weights, scheme and instruction set; used
            where it is.
        routing: which blocks the layers without a window see; None for all.

    Raises:
        BackendError: the kernels were not built, or a weight is missing.
        ConfigError: the decoder has no flat program, the scheme does not fit it, or weights of one
            product are on different grids (`why_mixed`).
    """
    reason = why_not_flat(config)
    if reason is not None:
        must = "one that the engine knows"
        raise ConfigError(describe("model", "Engine", must, reason, "Run it through its modules"))
    threads = checked_threads(threads)
    program = decoder_program(config)
    isa = instruction_set or chosen_instruction_set()
    native = compile_program(
        program,
        weights,
        scheme,
        max_tokens=MAX_STEP_TOKENS,
        threads=threads,
        instruction_set=isa,
        progress=progress,
        packed=packed,
        route=None if routing is None else _native_route(routing, config),
    )
    is_packed = packed is not None
    return Engine(config, scheme, program, isa, native, tokenizer, bundle, is_packed, routing)


def compile_program(
    program: Program,
    weights: Weights,
    scheme: Scheme,
    *,
    max_tokens: int,
    threads: int,
    instruction_set: str,
    progress: Callable[[float], None] | None = None,
    packed: Mapping[str, PackedBytes] | None = None,
    route: dict[str, object] | None = None,
) -> Any:
    """Return the compiled program with its weights; each is read once and packed.

    Args:
        program: of a model.
        weights, scheme, progress, packed: as in `build_engine`.
        max_tokens: of a step.
        threads: from 1 to `MAX_THREADS`.
        instruction_set: one that runs here.
        route: how attention chooses blocks; None for all.

    Raises:
        BackendError: the kernels were not built, or a weight is missing.
    """
    shape = _native_shape(program.shape)
    if route is not None:
        shape["route"] = route
    offsets, _ = plan_memory(program.instructions, program.widths)
    buffers = [(program.widths[name], offsets[name]) for name in offsets]
    book = _Numbers(list(offsets), program.instructions)
    native = kernels().make_program(
        instruction_set,
        shape,
        buffers,
        [book.native(item) for item in program.instructions],
        max_tokens,
        threads,
    )
    forms = forms_held(program, weights, scheme)
    for place, name in enumerate(book.matrices):
        _add_matrix(native, name, weights, forms[name], (packed or {}).get(name))
        if progress is not None:
            progress((place + 1) / len(book.matrices))
    for name in book.vectors:
        native.add_vector(_vector(needed_weight(weights, name)))
    native.start()
    return native


MOST_HEADS_ROUTED = 16
"""Query heads of a KV head that choose together."""


def _native_route(routing: Routing, config: DecoderConfig) -> dict[str, object]:
    if config.num_heads // config.num_kv_heads > MOST_HEADS_ROUTED:
        must = f"at most {MOST_HEADS_ROUTED} query heads a KV head"
        raise ConfigError(describe("heads", "routed attention", must, config.num_heads))
    return {
        "refresh": routing.refresh,
        "first_pages": routing.first,
        "recent_pages": routing.recent,
        "budget": routing.budget(-(-config.max_positions // PAGE_SIZE) + 1),
        "least_share": math.log(routing.threshold) if routing.threshold > 0 else -math.inf,
        "has_means": routing.means,
        "has_summaries": routing.summaries,
    }


def _native_shape(shape: ProgramShape) -> dict[str, object]:
    return {
        "heads": shape.num_heads,
        "kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "layers": shape.num_layers,
        "vocab": shape.vocab_size,
        "outputs": shape.num_outputs or shape.vocab_size,
        "is_causal": shape.is_causal,
        "norm_eps": shape.norm_eps,
        "rope_factor": shape.rope_factor,
        "score_scale": shape.head_dim**-0.5,
        "inverse_frequencies": list(shape.inverse_frequencies),
    }


_ACTIVATIONS = (None, "gelu", "gelu_new", "relu", "tanh")
"""In the order of the native program's numbers."""


class _Numbers:
    """Names of buffers and weights as the numbers that the native program knows."""

    def __init__(self, buffers: list[str], instructions: Sequence[Instruction]) -> None:
        self._buffers = {name: place for place, name in enumerate(buffers)} | {LOGITS: -1}
        named = (
            (
                each.norm,
                each.bias,
                each.positions,
                each.types,
                each.q_norm,
                each.k_norm,
                each.balance,
            )
            for each in instructions
        )
        vectors = dict.fromkeys(name for each in named for name in each if name is not None)
        self.matrices, self.vectors = matrices_of(instructions), list(vectors)
        self._matrices = {name: place for place, name in enumerate(self.matrices)}
        self._vectors: dict[str | None, int] = {name: i for i, name in enumerate(self.vectors)}

    def native(self, item: Instruction) -> dict[str, object]:
        """Return an instruction as the native program takes it."""
        return {
            "op": item.op,
            "input": 0 if item.input is None else self._buffers[item.input],
            "output": self._buffers[item.output],
            "weights": [self._matrices[name] for name in item.weights],
            "norm": self._vectors.get(item.norm, -1),
            "bias": self._vectors.get(item.bias, -1),
            "positions": self._vectors.get(item.positions, -1),
            "types": self._vectors.get(item.types, -1),
            "is_head": int(item.is_head),
            "activation": _ACTIVATIONS.index(item.activation),
            "q_norm": self._vectors.get(item.q_norm, -1),
            "k_norm": self._vectors.get(item.k_norm, -1),
            "adds": int(item.adds),
            "selected": ("all", "pick", "picked").index(item.rows),
            "layer": item.layer,
            "window": item.window or 0,
            "is_routed": int(item.window is None),
            "closes_below": -1.0 if item.closes_below is None else item.closes_below,
            "gates": -1 if item.gates is None else self._buffers[item.gates],
            "routes": self._buffers[item.routes] if item.routes else 0,
            "balance": self._vectors.get(item.balance, -1),
            "num_active": item.num_active,
            "num_groups": item.num_groups,
            "num_active_groups": item.num_active_groups,
            "normalizes": int(item.normalizes),
            "scale": item.scale,
        }


def matrices_of(instructions: Sequence[Instruction]) -> list[str]:
    """Return the matrices of a program's instructions, each once."""
    return list(dict.fromkeys(name for item in instructions for name in item.weights))


def _storage(name: str, scheme: Scheme) -> Storage:
    is_head = name.startswith(("model.embed_tokens", "lm_head", "embeddings."))
    return scheme.head_storage if is_head else scheme.weights


def forms_held(program: Program, weights: Weights, scheme: Scheme) -> dict[str, Form]:
    """Return how the engine holds each matrix of a program in a scheme.

    Raises:
        BackendError: a weight is missing.
        ConfigError: weights as they are stored are on different grids in one product.
    """
    exact = {name for item in program.instructions if item.is_exact for name in item.weights}
    if not scheme.as_stored:
        names = matrices_of(program.instructions)
        forms = {name: scheme.form_of(_storage(name, scheme)) for name in names}
        return forms | dict.fromkeys(exact, Form("float32"))
    found = forms_as_stored(program, weights)
    reason = why_mixed(program, found)
    if reason is not None:
        step = "Load it with a scheme, or put them on one grid"
        raise ConfigError(describe("weights", "Engine", "alike in a product", reason, step))
    forms = {name: form for name, form in found.items() if form is not None}
    return forms | dict.fromkeys(exact, Form("float32"))


def forms_as_stored(program: Program, weights: Weights) -> dict[str, Form | None]:
    """Return how the engine holds the weights of a program in the numbers that they have; None for
    one on a grid that it does not hold.

    Raises:
        BackendError: a weight is missing.
    """
    names = matrices_of(program.instructions)
    return {name: _form_as_stored(needed_weight(weights, name)) for name in names}


def _form_as_stored(source: Rows | GridSource) -> Form | None:
    if isinstance(source, Rows):
        return Form("bfloat16" if source.dtype == "bfloat16" else "float32")
    return form_of(source)


def _add_matrix(
    native: Any, name: str, weights: Weights, form: Form, packed: PackedBytes | None
) -> None:
    source = needed_weight(weights, name)
    count, width = source.shape
    given = weights(name.removesuffix("weight") + "bias")
    bias = None if given is None else _vector(given)
    if packed is not None:
        place = native.add_room(**_held(form), n=count, k=width, bias=bias)
        packed.read_into(_packed_view(native, place))
    elif _keeps_grid(source, form):
        _add_codes(native, source, form, bias)
    else:
        rows = source if isinstance(source, Rows) else _rows_of(source.read().values())
        native.add_weight(
            kind=form.storage,
            group=form.group or 0,
            rotated=form.is_rotated,
            source=rows.address,
            dtype=rows.dtype,
            n=count,
            k=width,
            stride=rows.stride_bytes,
            bias=bias,
        )


def _held(form: Form) -> dict[str, Any]:
    return {
        "kind": form.storage,
        "group": form.group or 0,
        "rotated": form.is_rotated,
        "input_scale": form.input_scale or 0.0,
    }


def _keeps_grid(source: Rows | GridSource, form: Form) -> TypeGuard[GridSource]:
    return not isinstance(source, Rows) and form == form_of(source)


def _add_codes(native: Any, source: GridSource, form: Form, bias: np.ndarray | None) -> None:
    grid = source.read()
    scale, least = halves_of(grid, form)
    native.add_codes(
        **_held(form),
        codes=np.ascontiguousarray(grid.codes),
        scale=np.ascontiguousarray(scale).view(np.uint16),
        least=np.ascontiguousarray(least).view(np.uint16),
        bias=bias,
    )


def _rows_of(values: np.ndarray) -> Rows:
    return Rows(values.ctypes.data, "float32", values.shape, values.strides[0], values)


def _packed_view(native: Any, place: int) -> memoryview:
    address, count = native.packed(place)
    return memoryview((ctypes.c_uint8 * count).from_address(address)).cast("B")


def needed_weight(weights: Weights, name: str) -> Rows | GridSource:
    """Return a weight; that of one expert out of a stack, where there is a stack.

    Raises:
        BackendError: there is none.
    """
    rows = weights(name) or _of_stack(weights, name)
    if rows is None:
        raise BackendError(describe(f"weight {name!r}", "Engine", "there", "no such weight"))
    return rows


_EXPERT = re.compile(r"^(?P<experts>.*)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight$")


def _of_stack(weights: Weights, name: str) -> Rows | None:
    """Return the weight of one expert out of those of all, or None where there are none."""
    match = _EXPERT.match(name)
    if match is None:
        return None
    part = match["part"]
    stacked = weights(f"{match['experts']}.{'down' if part == 'down' else 'gate_up'}_proj")
    if not isinstance(stacked, Rows):
        return None
    _, height, width = stacked.shape
    stride = stacked.stride_bytes // height
    address = stacked.address + int(match["index"]) * stacked.stride_bytes
    if part != "down":
        height //= 2
    if part == "up":
        address += height * stride
    return Rows(address, stacked.dtype, (height, width), stride, stacked.owner)


def _vector(rows: Rows | GridSource) -> np.ndarray:
    """Return a vector, or the rows of a table side by side, in float32."""
    if not isinstance(rows, Rows):
        return rows.read().values().ravel()
    count = math.prod(rows.shape)
    width = 4 if rows.dtype == "float32" else 2
    values = ctypes.string_at(rows.address, count * width)
    if rows.dtype == "bfloat16":
        return (np.frombuffer(values, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind = np.float32 if rows.dtype == "float32" else np.float16
    return np.frombuffer(values, kind).astype(np.float32)
