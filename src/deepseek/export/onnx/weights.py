"""A model's matrices as ONNX holds them, and the product with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deepseek.export.onnx.graph import Array, GraphWriter
from deepseek.ops.grid import Floats

Values = Callable[[str], Floats | None]
"""Gives a weight in float32 by its name; None where the model has none."""


class FloatProducts:
    """Products with weights in float32."""

    def __init__(self, graph: GraphWriter, values: Values) -> None:
        self._graph, self._values = graph, values

    def vector(self, name: str) -> str:
        """Write a vector."""
        return self._graph.tensor(name, required(self._values, name))

    def rows(self, name: str, ids: str) -> str:
        """Return the rows of a table [N, K] at ids: [..., K]."""
        if not self._graph.has_tensor(name):
            self._graph.tensor(name, required(self._values, name))
        return self._graph.node("Gather", name, ids)

    def product(self, inputs: str, weights: Sequence[str], *, is_exact: bool = False) -> str:
        """Return `inputs @ weight.T + bias` of weights whose outputs stand side by side.

        Args:
            inputs: [batch, tokens, K].
            weights: names of [N, K] each.
            is_exact: they stay float32 however the others are held.
        """
        graph = self._graph
        if len(weights) == 1 and graph.has_tensor(weights[0]):  # a head tied to its embedding
            turned = graph.node("Transpose", weights[0], perm=[1, 0])
        else:
            turned = graph.tensor(*self._beside(weights))
        return add_biases(graph, self._values, weights, graph.node("MatMul", inputs, turned))

    def _beside(self, weights: Sequence[str]) -> tuple[str, Array]:
        parts = [required(self._values, name) for name in weights]
        return "+".join(weights), np.concatenate(parts).T


def add_biases(graph: GraphWriter, values: Values, weights: Sequence[str], outputs: str) -> str:
    """Return outputs with the biases of the weights that made them; some may have none."""
    biases = [values(bias_of(name)) for name in weights]
    if all(bias is None for bias in biases):
        return outputs
    filled = [
        np.zeros(len(required(values, name)), np.float32) if bias is None else bias
        for name, bias in zip(weights, biases, strict=True)
    ]
    name = "+".join(bias_of(name) for name in weights)
    return graph.node("Add", outputs, graph.tensor(name, np.concatenate(filled)))


def bias_of(weight: str) -> str:
    """Return the name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def required(values: Values, name: str) -> Floats:
    """Return a weight that is there."""
    found = values(name)
    assert found is not None, name
    return found
