"""An encoder's flat program as an ONNX graph.

Inputs and outputs are named as transformers names them: `input_ids`, `attention_mask`
[batch, tokens] and, where the model has several, `token_type_ids`; `last_hidden_state`
[batch, tokens, width], or `logits` [batch, labels] of a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from deepseek.export.onnx.attention import add_bias, attend, read_places
from deepseek.export.onnx.decoder import LAYER
from deepseek.export.onnx.graph import CONTRIB, GraphWriter
from deepseek.export.onnx.weights import FloatProducts
from deepseek.graph import Instruction, Program
from deepseek.graph.program import Activation


class EncoderGraph:
    """Writes the nodes of an encoder's program.

    Args:
        graph: to write to.
        program: of the encoder.
        products: how its matrices are held.
        fuses: attention is ONNX Runtime's one operator for it.
    """

    def __init__(
        self, graph: GraphWriter, program: Program, products: FloatProducts, *, fuses: bool
    ) -> None:
        self._graph, self._program, self._products = graph, program, products
        self._shape, self._fuses = program.shape, fuses
        self._values: dict[str, str] = {}
        self._norms = 0

    def write(self, report: Callable[[float], None]) -> None:
        """Write inputs, nodes and outputs; `report` is called with the share that is done."""
        graph, program = self._graph, self._program
        ids = graph.input("input_ids", np.int64, ["batch", "tokens"])
        mask = graph.input("attention_mask", np.int64, ["batch", "tokens"])
        self._places = read_places(graph, program.shape, mask, None)
        bias = add_bias(graph, self._places, is_causal=False, window=None)
        self._bias = bias if self._fuses else graph.node("Unsqueeze", bias, graph.constant([1]))
        is_classifier = any(item.activation == "tanh" for item in program.instructions)
        for place, item in enumerate(program.instructions):
            report(place / len(program.instructions))
            self._add(item, ids)
        if is_classifier:
            labels = program.shape.num_outputs
            assert labels is not None
            graph.output("logits", np.float32, ["batch", labels])
        else:
            width = program.widths["states"]
            graph.output("last_hidden_state", np.float32, ["batch", "tokens", width])

    def _add(self, item: Instruction, ids: str) -> None:
        graph, values = self._graph, self._values
        if item.op == "embed":
            values[item.output] = self._embed(item, ids)
        elif item.op == "copy":
            assert item.input is not None
            value = values[item.input]
            if item.is_head:
                value = graph.node("Identity", value, name="last_hidden_state")
            values[item.output] = value
        elif item.op == "attend":
            values[item.output] = self._attend(item)
        elif item.op == "layer_norm":
            values[item.output] = self._layer_norm(item)
        else:
            assert item.op == "linear", item.op
            self._linear(item)

    def _embed(self, item: Instruction, ids: str) -> str:
        graph, products = self._graph, self._products
        assert item.positions is not None
        assert item.types is not None
        types = graph.input("token_type_ids", np.int64, ["batch", "tokens"])
        summed = graph.node(
            "Add", products.rows(item.weights[0], ids), products.rows(item.types, types)
        )
        return graph.node("Add", summed, products.rows(item.positions, self._places.queries))

    def _linear(self, item: Instruction) -> None:
        graph, values = self._graph, self._values
        assert item.input is not None
        inputs = values[item.input]
        if item.is_head:  # of a classifier: it reads the first token
            inputs = graph.node("Gather", inputs, graph.constant([0]), axis=1)
        made = self._products.product(inputs, item.weights, is_exact=item.is_exact)
        if item.activation is not None:
            made = activate(graph, made, item.activation)
        if item.adds:
            made = graph.node("Add", values[item.output], made)
        elif item.output == "logits":
            made = graph.node("Squeeze", made, graph.constant([1]), name="logits")
        values[item.output] = made

    def _layer_norm(self, item: Instruction) -> str:
        """Return normed states; the second norm of a layer ends it."""
        graph = self._graph
        assert item.input is not None
        assert item.norm is not None
        assert item.bias is not None
        ends = self._norms > 0 and self._norms % 2 == 0
        name = LAYER.format(self._norms // 2 - 1) if ends else None
        self._norms += 1
        return graph.node(
            "LayerNormalization",
            self._values[item.input],
            self._products.vector(item.norm),
            self._products.vector(item.bias),
            name=name,
            axis=-1,
            epsilon=self._shape.norm_eps,
        )

    def _attend(self, item: Instruction) -> str:
        graph, shape = self._graph, self._shape
        assert item.input is not None
        qkv = self._values[item.input]
        if self._fuses:
            parts = graph.nodes("Split", qkv, outputs=3, axis=-1, num_outputs=3)
            return graph.node(
                "MultiHeadAttention",
                *parts,
                "",
                "",
                self._fused_bias(),
                domain=CONTRIB,
                num_heads=shape.num_heads,
            )
        by_head = graph.node("Reshape", qkv, graph.constant([0, 0, -1, shape.head_dim]))
        turned = graph.node("Transpose", by_head, perm=[0, 2, 1, 3])
        queries, keys, values = graph.nodes("Split", turned, outputs=3, axis=1, num_outputs=3)
        return attend(graph, shape, self._places, queries, keys, values, self._bias)

    def _fused_bias(self) -> str:
        """Return the bias for every query [batch, 1, tokens, tokens], made once."""
        graph = self._graph
        if not hasattr(self, "_square"):
            sizes = [
                graph.node("Shape", "input_ids", start=0, end=1),
                graph.constant([1]),
                self._places.total,
                self._places.total,
            ]
            whole = graph.node("Concat", *sizes, axis=0)
            self._square = graph.node("Expand", self._bias, whole)
        return self._square


def activate(graph: GraphWriter, states: str, activation: Activation) -> str:
    """Return the activation of states, in the form that runtimes know."""
    if activation == "relu":
        return graph.node("Relu", states)
    if activation == "tanh":
        return graph.node("Tanh", states)
    if activation == "gelu_new":
        return graph.node("Gelu", states, approximate="tanh")
    one, half = (graph.constant(value, np.float32) for value in (1.0, 0.5))
    turned = graph.node("Erf", graph.node("Div", states, graph.constant(math.sqrt(2), np.float32)))
    return graph.node("Mul", graph.node("Mul", states, graph.node("Add", turned, one)), half)
