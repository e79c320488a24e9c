"""Small native programs around one operation: inputs come in as the rows of an embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deepseek.ops.cpu import (
    emulated_instruction_sets,
    instruction_sets,
    kernels,
    why_missing,
)

NEEDS_KERNELS = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
ISAS = [] if why_missing() is not None else instruction_sets() + emulated_instruction_sets()
BEST = instruction_sets()[-1] if why_missing() is None else ""
PAGE = 64


class Native:
    """A program over float32 matrices: weight 0 is the table of inputs."""

    def __init__(
        self,
        isa: str,
        widths: list[int],
        instructions: list[dict[str, Any]],
        *,
        vocab: int,
        heads: tuple[int, int, int] = (1, 1, 16),
        threads: int = 2,
        angles: list[float] | None = None,
        max_tokens: int = 600,
        route: dict[str, Any] | None = None,
    ) -> None:
        offsets = np.cumsum([0, *widths[:-1]]).tolist()
        num_heads, kv_heads, dim = heads
        shape = {
            "heads": num_heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "layers": 1,
            "vocab": vocab,
            "norm_eps": 1e-5,
            "rope_factor": 1.0,
            "score_scale": dim**-0.5,
            "inverse_frequencies": angles or [0.0] * (dim // 2),
        }
        if route is not None:
            shape["route"] = route
        buffers = list(zip(widths, offsets, strict=True))
        self.program = kernels().make_program(
            isa, shape, buffers, instructions, max_tokens, threads
        )
        self.vocab = vocab
        self.width = vocab

    def weight(
        self,
        values: np.ndarray,
        kind: str = "float32",
        *,
        group: int | None = 32,
        bias: np.ndarray | None = None,
    ) -> None:
        """Add a weight [n, k] of float32, possibly a view with a stride."""
        self.program.add_weight(
            kind=kind,
            group=group or 0,
            rotated=kind == "int8",
            source=values.ctypes.data,
            dtype="float32",
            n=values.shape[0],
            k=values.shape[1],
            stride=values.strides[0],
            bias=bias,
        )

    def run(
        self,
        tokens: list[int],
        positions: list[int] | None = None,
        rows: list[int] | None = None,
        table: np.ndarray | None = None,
        pages: Any = None,
        selected: list[int] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run one step and return the logits of the selected tokens, all by default."""
        count = len(tokens)
        positions = [0] * count if positions is None else positions
        rows = list(range(count)) if rows is None else rows
        table = np.arange(count, dtype=np.int32)[:, None] if table is None else table
        pages = self.pages("float32", max(1, int(table.max()) + 1)) if pages is None else pages
        places = list(range(count)) if selected is None else selected
        if out is None:
            out = np.full((len(places), self.vocab), np.nan, np.float32)
        arrays = [np.array(each, np.int32) for each in (tokens, positions, rows)]
        table = np.ascontiguousarray(table, np.int32)
        self.program.run(pages, *arrays, table, np.array(places, np.int32), out)
        return out

    def pages(self, kind: str, count: int) -> Any:
        """Return new pages."""
        return kernels().KvPages(kind, self.program, count)
