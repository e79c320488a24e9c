"""Products with weights on grids of integers, whose codes the file holds as they are.

Eight bits by rows become int8 tensors with a scale for each output channel: with integer inputs
(`QuantizeLinear` … `DequantizeLinear` where their scale is static, `MatMulInteger` where each token
has its own), or with float inputs and a `DequantizeLinear` of the weight. Every other grid becomes
`MatMulNBits`, an operator of ONNX Runtime, which holds groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from deepseek.export.onnx.graph import CONTRIB, GraphWriter
from deepseek.export.onnx.weights import FloatProducts, Values, add_biases
from deepseek.ops.grid import OFFSET, Bytes, Grid, GridSource
from deepseek.ops.rotation import rotate
from deepseek.ops.scheme import ROTATED

Activations = Literal["int8", "float32"]
Grids = Callable[[str], GridSource | None]
"""Gives the grid that a weight lies on by its name; None where it lies on none."""
_LEAST_BLOCK, _MOST_BLOCK = 16, 256
_OF_ACTIVATIONS = {"int8": 4, "float32": 1}
"""`accuracy_level` of MatMulNBits: what it computes with. Source: its
ContribOperators.md."""


class GridProducts(FloatProducts):
    """Products with weights on grids, and in float32 with those on none.

    Args:
        graph: to write to.
        values: gives the weights in float32.
        grids: gives their grids.
        activations: what inputs of products are rounded to.
    """

    def __init__(
        self, graph: GraphWriter, values: Values, grids: Grids, activations: Activations
    ) -> None:
        super().__init__(graph, values)
        self._grids, self._activations = grids, activations
        self._rounded: dict[tuple[str, float | None], tuple[str, str]] = {}
        self._rotated: dict[str, str] = {}

    def rows(self, name: str, ids: str) -> str:
        """Return the rows of a table [N, K] at ids: [..., K]."""
        grid = self._grid(name)
        if grid is None:
            return super().rows(name, ids)
        gather = self._gather_rows if is_by_rows(grid) else self._gather_blocks
        made = gather(name, grid, ids)
        return self._rotate(made) if grid.is_rotated else made

    def product(self, inputs: str, weights: Sequence[str], *, is_exact: bool = False) -> str:
        """Return `inputs @ weight.T + bias` of weights side by side, as `FloatProducts` does."""
        found = [None if is_exact else self._grid(name) for name in weights]
        grids = [grid for grid in found if grid is not None]
        if not grids:
            return super().product(inputs, weights, is_exact=is_exact)
        if len(grids) < len(weights) or len({_kind(grid) for grid in grids}) > 1:
            return self._apart(inputs, weights)
        made = self._multiply(inputs, weights, grids)
        return add_biases(self._graph, self._values, weights, made)

    def _grid(self, name: str) -> Grid | None:
        """Return the grid of a weight where the file can hold it."""
        source = self._grids(name)
        grid = None if source is None else source.read()
        return grid if grid is not None and (is_by_rows(grid) or block_of(grid)) else None

    def _apart(self, inputs: str, weights: Sequence[str]) -> str:
        """Return products that cannot be one, side by side."""
        made = [self.product(inputs, [name]) for name in weights]
        return self._graph.node("Concat", *made, axis=-1)

    def _multiply(self, inputs: str, weights: Sequence[str], grids: Sequence[Grid]) -> str:
        if grids[0].is_rotated:
            inputs = self._rotate(inputs)
        name = "+".join(weights)
        if not is_by_rows(grids[0]):
            return self._by_blocks(inputs, name, joined(grids))
        codes, scale = self._write_rows(name, joined(grids))
        turned = self._graph.node("Transpose", codes, perm=[1, 0])
        if grids[0].input_scale is not None and self._activations == "int8":
            return self._static(inputs, turned, scale, grids[0].input_scale)
        if self._activations == "float32":
            return self._graph.node("MatMul", inputs, self._whole(turned, scale))
        return self._dynamic(inputs, turned, scale)

    def _write_rows(self, name: str, grid: Grid) -> tuple[str, str]:
        """Write int8 codes [N, K] and scales [N], once: a tied head has those of its embedding."""
        codes, scale = f"{name}.codes", f"{name}.scale"
        if not self._graph.has_tensor(codes):
            signed = (grid.codes ^ np.uint8(OFFSET[8])).view(np.int8)
            self._graph.tensor(codes, signed)
            self._graph.tensor(scale, grid.scale[:, 0])
        return codes, scale

    def _whole(self, turned: str, scale: str) -> str:
        return self._graph.node("DequantizeLinear", turned, scale, axis=1)

    def _static(self, inputs: str, turned: str, scale: str, input_scale: float) -> str:
        graph, key = self._graph, (inputs, input_scale)
        if key not in self._rounded:
            step = graph.constant(input_scale, np.float32)
            middle = graph.constant(OFFSET[8], np.uint8)
            codes = graph.node("QuantizeLinear", inputs, step, middle)
            self._rounded[key] = graph.node("DequantizeLinear", codes, step, middle), ""
        return graph.node("MatMul", self._rounded[key][0], self._whole(turned, scale))

    def _dynamic(self, inputs: str, turned: str, scale: str) -> str:
        """Return the product of integers, each token with its own scale: one for a whole batch
        would let a token with large states spoil all others."""
        graph, key = self._graph, (inputs, None)
        middle = graph.constant(OFFSET[8], np.uint8)
        if key not in self._rounded:
            most = graph.node("ReduceMax", graph.node("Abs", inputs), graph.constant([-1]))
            most = graph.node("Max", most, graph.constant(1e-9, np.float32))
            step = graph.node("Mul", most, graph.constant(1 / 127, np.float32))
            levels = graph.node("Round", graph.node("Div", inputs, step))
            moved = graph.node("Add", levels, graph.constant(OFFSET[8], np.float32))
            self._rounded[key] = graph.node("Cast", moved, to=2), step
        codes, step = self._rounded[key]
        summed = graph.node("Cast", graph.node("MatMulInteger", codes, turned, middle), to=1)
        return graph.node("Mul", graph.node("Mul", summed, scale), step)

    def _rotate(self, inputs: str) -> str:
        """Return inputs behind the rotation of every 64 channels, which is its own inverse."""
        if inputs not in self._rotated:
            graph = self._graph
            if not graph.has_tensor("rotation"):
                graph.tensor("rotation", rotate(np.eye(ROTATED, dtype=np.float32)))
            blocks = graph.node("Reshape", inputs, graph.constant([0, 0, -1, ROTATED]))
            turned = graph.node("MatMul", blocks, "rotation")
            self._rotated[inputs] = graph.node("Reshape", turned, graph.constant([0, 0, -1]))
        return self._rotated[inputs]

    def _by_blocks(self, inputs: str, name: str, grid: Grid) -> str:
        block = block_of(grid)
        rows, width = grid.shape
        return self._graph.node(
            "MatMulNBits",
            inputs,
            *self._write_blocks(name, grid, block),
            domain=CONTRIB,
            bits=grid.bits,
            block_size=block,
            N=rows,
            K=width,
            accuracy_level=_OF_ACTIVATIONS[self._activations],
        )

    def _write_blocks(self, name: str, grid: Grid, block: int) -> list[str]:
        """Write codes [N, blocks, bytes], scales and, where they are not usual, zero points."""
        graph, parts = self._graph, [f"{name}.{part}" for part in ("codes", "scale", "zero")]
        repeats = grid.group // block
        has_zeros = bool((grid.zero != OFFSET[grid.bits]).any())
        if not graph.has_tensor(parts[0]):
            rows = len(grid.codes)
            graph.tensor(parts[0], packed(grid.codes.reshape(rows, -1, block), grid.bits))
            graph.tensor(parts[1], np.repeat(grid.scale, repeats, 1))
            if has_zeros:
                graph.tensor(parts[2], packed(np.repeat(grid.zero, repeats, 1), grid.bits))
        return parts if has_zeros else parts[:2]

    def _gather_rows(self, name: str, grid: Grid, ids: str) -> str:
        """Return rows of a table that has a scale for each row."""
        graph = self._graph
        codes, scale = self._write_rows(name, grid)
        picked = graph.node("Cast", graph.node("Gather", codes, ids), to=1)
        factor = graph.node("Gather", scale, ids)
        return graph.node("Mul", picked, graph.node("Unsqueeze", factor, graph.constant([-1])))

    def _gather_blocks(self, name: str, grid: Grid, ids: str) -> str:
        """Return rows of a table in blocks, by ONNX Runtime's operator for it."""
        graph, block = self._graph, block_of(grid)
        codes, *rest = self._write_blocks(name, grid, block)
        flat = graph.node("Reshape", codes, graph.constant([len(grid.codes), -1]))
        return graph.node(
            "GatherBlockQuantized",
            flat,
            ids,
            *rest,
            domain=CONTRIB,
            bits=grid.bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )


def is_by_rows(grid: Grid) -> bool:
    """Return whether a grid has eight bits, symmetric, and one scale a row."""
    return grid.bits == 8 and grid.scale.shape[1] == 1 and bool((grid.zero == OFFSET[8]).all())


def block_of(grid: Grid) -> int:
    """Return the channels of a block that `MatMulNBits` can have for a grid: a power of two that
    divides the group; 0 where there is none."""
    block = min(grid.group & -grid.group, _MOST_BLOCK)
    return block if block >= _LEAST_BLOCK else 0


def joined(grids: Sequence[Grid]) -> Grid:
    """Return the rows of grids of one kind as one grid."""
    first = grids[0]
    codes, scale, zero = (
        np.concatenate([getattr(grid, part) for grid in grids])
        for part in ("codes", "scale", "zero")
    )
    return Grid(first.bits, codes, scale, zero, first.is_rotated, first.input_scale)


def packed(codes: Bytes, bits: int) -> Bytes:
    """Return codes [..., n] with those of four bits two to a byte, the first in the low half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | (codes[..., 1::2] << 4).astype(np.uint8)


def _kind(grid: Grid) -> tuple[object, ...]:
    return grid.bits, grid.group, grid.is_rotated, grid.input_scale, is_by_rows(grid)
