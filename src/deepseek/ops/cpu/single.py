"""One operation at a time on the compiled kernels: what a contract check or a comparison calls.

The engine runs whole programs (`generate.engine`), in which weights are packed once and a step is
one call. Here every call is a program of its own, whose inputs come in as the rows of an embedding:
the same kernels and the same bits, not the same speed. Loads no torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from deepseek.errors import ShapeError, describe
from deepseek.ops.cpu import default_threads, kernels
from deepseek.ops.scheme import KVStorage, Storage

_PAGE = 64
"""Slots of a page, as `kPage` in types.h."""
_EMBED = {"op": "embed", "output": 0, "weights": [0]}
_READ_OUT = {"op": "linear", "output": -1, "weights": [1], "selected": 1}


class PackedLinear:
    """The product with one weight, packed once."""

    def __init__(
        self,
        weight: np.ndarray,
        bias: np.ndarray | None = None,
        *,
        storage: Storage,
        group: int | None = 32,
        isa: str,
    ) -> None:
        """Pack the weight.

        Args:
            weight: float32 [N, K], N and K at least 1.
            bias: float32 [N] or None.
            storage: how the weight is held.
            group: weights of one scale, integers only; int8 has at least 64, or None for a whole
                row.
            isa: instruction set whose kernels run, one of `instruction_sets()`.

        Raises:
            ShapeError: weight and bias do not fit one another.
            BackendError: the kernels were not built.
        """
        is_matrix = weight.ndim == 2 and 0 not in weight.shape
        if not is_matrix or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = [list(each.shape) for each in (weight, bias) if each is not None]
            raise ShapeError(describe("weight", "PackedLinear", "[N, K], its bias [N]", shapes))
        self._isa, (self._columns, self._width) = isa, weight.shape
        self._form: dict[str, Any] = {
            "kind": storage,
            "group": group or 0,
            "rotated": storage == "int8",
            "n": self._columns,
            "k": self._width,
            "bias": None if bias is None else _float32(bias),
        }
        self._holder = _program(isa, [self._width], [], tokens=1, vocab=1)
        _add_matrix(self._holder, weight, self._form)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return the product of inputs float32 [M, K]: float32 [M, N].

        Raises:
            ShapeError: the inputs do not fit the weight.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self._width:
            must = f"[M, {self._width}], as the weight says"
            raise ShapeError(describe("inputs", "PackedLinear", must, list(inputs.shape)))
        count = len(inputs)
        if count == 0:
            return np.empty((0, self._columns), np.float32)
        # the vocabulary bounds both the tokens and the width of the logits
        vocab = max(count, self._columns)
        instructions = [_EMBED, {**_READ_OUT, "input": 0}]
        program = _program(self._isa, [self._width], instructions, tokens=count, vocab=vocab)
        _add_matrix(program, inputs)
        address, num_bytes = self._holder.packed(0)
        room, _ = program.packed(program.add_room(**self._form))
        ctypes.memmove(room, address, num_bytes)
        program.start()
        pages = kernels().KvPages("float32", program, 1)
        positions, rows = np.zeros(count, np.int32), np.arange(count, dtype=np.int32)
        table = np.zeros((count, 1), np.int32)
        return _run(program, pages, (positions, rows), table, rows, vocab)[:, : self._columns]


def paged_attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, *, storage: KVStorage, isa: str
) -> np.ndarray:
    """Return causal attention of the last T slots of each row over pages: [B, heads, T, dim].

    Args:
        queries: float32 [B, heads, T, dim], of the last T of S slots; dim is even.
        keys, values: float32 [B, KV heads, S, dim].
        storage: how keys and values are held.
        isa: instruction set whose kernels run, one of `instruction_sets()`.

    Raises:
        ShapeError: queries, keys and values do not fit one another.
        BackendError: the kernels were not built.
    """
    _check_attention(queries, keys, values)
    batch, heads, length, dim = queries.shape
    kv_heads, slots = keys.shape[1:3]
    if length == 0 or batch == 0:
        return np.empty(queries.shape, np.float32)
    width, count = heads * dim, batch * slots
    instructions = [
        _EMBED,
        {"op": "attend", "input": 0, "output": 1, "layer": 0},
        {**_READ_OUT, "input": 1},
    ]
    widths, vocab = [width + 2 * kv_heads * dim, width], max(count, width)
    shape = (heads, kv_heads, dim)
    program = _program(isa, widths, instructions, tokens=count, vocab=vocab, heads=shape)
    _add_matrix(program, _token_rows(queries, keys, values))
    _add_matrix(program, np.eye(width, dtype=np.float32))
    program.start()
    per_row = -(-slots // _PAGE)
    pages = kernels().KvPages(storage, program, batch * per_row)
    table = np.arange(batch * per_row, dtype=np.int32).reshape(batch, per_row)
    positions = np.tile(np.arange(slots, dtype=np.int32), batch)
    rows = np.repeat(np.arange(batch, dtype=np.int32), slots)
    newest = np.flatnonzero(positions >= slots - length)
    found = _run(program, pages, (positions, rows), table, newest, vocab)[:, :width]
    return found.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)


def _check_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    fits = (
        queries.ndim == keys.ndim == 4
        and keys.shape == values.shape
        and (queries.shape[0], queries.shape[3]) == (keys.shape[0], keys.shape[3])
        and keys.shape[1] > 0
        and queries.shape[1] % keys.shape[1] == 0
        and queries.shape[2] <= keys.shape[2]
        and queries.shape[3] % 2 == 0
    )
    if not fits:
        must = "[B, heads, T, even dim] over keys and values [B, KV heads, S, dim], T at most S"
        shapes = [list(each.shape) for each in (queries, keys, values)]
        raise ShapeError(describe("queries", "paged_attention", must, shapes))


def _token_rows(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return query, key and value of each token side by side; the older tokens' queries are 0."""
    batch, heads, length, dim = queries.shape
    kv_heads, slots = keys.shape[1:3]
    rows = np.zeros((batch, slots, heads + 2 * kv_heads, dim), np.float32)
    rows[:, slots - length :, :heads] = queries.transpose(0, 2, 1, 3)
    rows[:, :, heads : heads + kv_heads] = keys.transpose(0, 2, 1, 3)
    rows[:, :, heads + kv_heads :] = values.transpose(0, 2, 1, 3)
    return rows.reshape(batch * slots, -1)


def _program(
    isa: str,
    widths: list[int],
    instructions: list[dict[str, Any]],
    *,
    tokens: int,
    vocab: int,
    heads: tuple[int, int, int] = (1, 1, 2),
) -> Any:
    num_heads, kv_heads, dim = heads
    shape = {
        "heads": num_heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "layers": 1,
        "vocab": vocab,
        "norm_eps": 0.0,
        "rope_factor": 1.0,
        "score_scale": dim**-0.5,
        "inverse_frequencies": [0.0] * (dim // 2),
    }
    offsets = [sum(widths[:place]) for place in range(len(widths))]
    buffers = list(zip(widths, offsets, strict=True))
    return kernels().make_program(isa, shape, buffers, instructions, tokens, default_threads())


def _add_matrix(program: Any, values: np.ndarray, form: dict[str, Any] | None = None) -> None:
    """Add a matrix [n, k] in a form, by default as it is."""
    rows = _float32(values)
    count, width = rows.shape
    plain = {"kind": "float32", "group": 1, "rotated": False, "n": count, "k": width, "bias": None}
    place = {"source": rows.ctypes.data, "dtype": "float32", "stride": rows.strides[0]}
    program.add_weight(**place, **(form or plain))


def _run(
    program: Any,
    pages: Any,
    places: tuple[np.ndarray, np.ndarray],
    table: np.ndarray,
    selected: np.ndarray,
    vocab: int,
) -> np.ndarray:
    """Return the logits of selected tokens at some positions of rows; token i is row i of the
    embedding."""
    positions, rows = places
    tokens = np.arange(len(positions), dtype=np.int32)
    logits = np.empty((len(selected), vocab), np.float32)
    program.run(pages, tokens, positions, rows, table, selected.astype(np.int32), logits)
    return logits


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)
