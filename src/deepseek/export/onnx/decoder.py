"""A decoder's flat program as an ONNX graph: one graph that reads a prompt and every step after it.

Inputs and outputs are named as Optimum names them, so that its `ORTModelForCausalLM` runs the file:
`input_ids` [batch, tokens], `attention_mask` [batch, past + tokens], `past_key_values.N.key` and
`.value` [batch, KV heads, past, head dim]; `logits`, `present.N.key` and `.value`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deepseek.export.onnx.attention import (
    add_bias,
    attend,
    read_places,
    rope_of,
    rotate,
)
from deepseek.export.onnx.graph import CONTRIB, GraphWriter
from deepseek.export.onnx.weights import FloatProducts
from deepseek.graph import Instruction, Program

LAYER = "layers.{}.states"
"""Name of the states behind a layer."""
FUSED_MULTIPLE = 8
"""Of channels of a head, which the fused attention asks for."""
LAST = "last.normed"
"""Name of what the head reads."""


class DecoderGraph:
    """Writes the nodes of a decoder's program.

    Args:
        graph: to write to.
        program: of the decoder.
        products: how its matrices are held.
        max_positions: longest text, in tokens.
        fuses: attention is ONNX Runtime's one operator for it.
    """

    def __init__(
        self,
        graph: GraphWriter,
        program: Program,
        products: FloatProducts,
        max_positions: int,
        *,
        fuses: bool,
    ) -> None:
        self._graph, self._program, self._products = graph, program, products
        self._shape, self._max_positions, self._fuses = program.shape, max_positions, fuses
        self._values: dict[str, str] = {}
        self._normed: dict[tuple[str, str], str] = {}
        self._biases: dict[int | None, str] = {}
        self._layer = 0

    def write(self, report: Callable[[float], None]) -> None:
        """Write inputs, nodes and outputs; `report` is called with the share that is done."""
        graph, shape = self._graph, self._shape
        ids = graph.input("input_ids", np.int64, ["batch", "tokens"])
        mask = graph.input("attention_mask", np.int64, ["batch", "total"])
        cached = ["batch", shape.num_kv_heads, "past", shape.head_dim]
        for layer in range(shape.num_layers):
            for part in ("key", "value"):
                graph.input(f"past_key_values.{layer}.{part}", np.float32, cached)
        self._places = read_places(graph, shape, mask, "past_key_values.0.key")
        self._prepare()
        for place, item in enumerate(self._program.instructions):
            report(place / len(self._program.instructions))
            self._add(item, ids)
        graph.output("logits", np.float32, ["batch", "tokens", shape.vocab_size])
        grown = ["batch", shape.num_kv_heads, "total", shape.head_dim]
        for layer in range(shape.num_layers):
            for part in ("key", "value"):
                graph.output(f"present.{layer}.{part}", np.float32, grown)

    def _prepare(self) -> None:
        graph, shape = self._graph, self._shape
        if not self._fuses:
            self._cos, self._sin = rope_of(graph, shape, self._places.queries)
            return
        angles = np.outer(
            np.arange(self._max_positions, dtype=np.float32),
            np.asarray(shape.inverse_frequencies, np.float32),
        )
        factor = np.float32(shape.rope_factor)
        self._cos = graph.tensor("rope.cos", np.cos(angles) * factor)
        self._sin = graph.tensor("rope.sin", np.sin(angles) * factor)
        rows = graph.node("Shape", "attention_mask", start=0, end=1)
        last = graph.node("Sub", self._places.total, graph.constant([1]))
        last = graph.node("Cast", graph.node("Expand", last, rows), to=6)
        self._last = last
        self._total = graph.node("Cast", graph.node("Squeeze", self._places.total), to=6)

    def _add(self, item: Instruction, ids: str) -> None:
        graph, values = self._graph, self._values
        if item.op == "embed":
            values[item.output] = self._products.rows(item.weights[0], ids)
        elif item.op == "copy":
            assert item.input is not None
            values[item.output] = values[item.input]
        elif item.op == "attend":
            values[item.output] = self._attend(item)
        elif item.op == "linear":
            made = self._products.product(self._input(item), item.weights, is_exact=item.is_exact)
            self._set(item, self._gates(item, made))
        else:
            assert item.op == "swiglu", item.op
            both = self._products.product(self._input(item), item.weights)
            gate, up = graph.nodes("Split", both, outputs=2, axis=-1, num_outputs=2)
            gate = graph.node("Mul", gate, graph.node("Sigmoid", gate))
            values[item.output] = graph.node("Mul", gate, up)

    def _set(self, item: Instruction, made: str) -> None:
        """Set or add to a buffer; what ends a layer or the model gets its name."""
        graph, values = self._graph, self._values
        if item.adds:
            assert item.input is not None
            ends = item.input == "hidden"
            name = LAYER.format(self._layer) if ends else None
            self._layer += ends
            made = graph.node("Add", values[item.output], made, name=name)
        elif item.is_head:
            made = graph.node("Identity", made, name="logits")
        values[item.output] = made

    def _gates(self, item: Instruction, made: str) -> str:
        """Return the gates that logits become, where the instruction says so."""
        if item.closes_below is None:
            return made
        graph = self._graph
        two, zero = (graph.constant(value, np.float32) for value in (2.0, 0.0))
        gates = graph.node("Mul", graph.node("Sigmoid", made), two)
        least = graph.constant(item.closes_below, np.float32)
        return graph.node("Where", graph.node("Less", gates, least), zero, gates)

    def _input(self, item: Instruction) -> str:
        assert item.input is not None
        value = self._values[item.input]
        if item.norm is None:
            return value
        key = (value, item.norm)
        if key not in self._normed:
            weight = self._products.vector(item.norm)
            name = LAST if item.is_head else None
            self._normed[key] = self._rms_norm(value, weight, name)
        return self._normed[key]

    def _rms_norm(self, states: str, weight: str, name: str | None = None) -> str:
        graph = self._graph
        power = graph.node("Pow", states, graph.constant(2.0, np.float32))
        mean = graph.node("ReduceMean", power, graph.constant([-1]), keepdims=1)
        moved = graph.node("Add", mean, graph.constant(self._shape.norm_eps, np.float32))
        scaled = graph.node("Div", states, graph.node("Sqrt", moved))
        return graph.node("Mul", scaled, weight, name=name)

    def _attend(self, item: Instruction) -> str:
        assert item.input is not None
        made = (self._fused if self._fuses else self._unfused)(item, self._values[item.input])
        if item.gates is None:
            return made
        graph, shape = self._graph, self._shape
        split = graph.constant([0, 0, shape.num_heads, shape.head_dim])
        gates = graph.node("Unsqueeze", self._values[item.gates], graph.constant([-1]))
        made = graph.node("Mul", graph.node("Reshape", made, split), gates)
        return graph.node("Reshape", made, graph.constant([0, 0, -1]))

    def _bias(self, window: int | None) -> str:
        """Return what is added to scores, once for each window."""
        if window not in self._biases:
            graph = self._graph
            bias = add_bias(graph, self._places, is_causal=True, window=window)
            if not self._fuses:
                bias = graph.node("Unsqueeze", bias, graph.constant([1]))
            self._biases[window] = bias
        return self._biases[window]

    def _heads(self, item: Instruction, qkv: str) -> tuple[str, str, str]:
        """Return queries, keys and values [batch, tokens, heads, head dim], normed where they
        are."""
        graph, shape = self._graph, self._shape
        split = graph.constant([0, 0, -1, shape.head_dim])
        counts = graph.constant([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads])
        by_head = graph.node("Reshape", qkv, split)
        queries, keys, values = graph.nodes("Split", by_head, counts, outputs=3, axis=2)
        if item.q_norm is not None and item.k_norm is not None:
            queries = self._rms_norm(queries, self._products.vector(item.q_norm))
            keys = self._rms_norm(keys, self._products.vector(item.k_norm))
        return queries, keys, values

    def _unfused(self, item: Instruction, qkv: str) -> str:
        graph, layer = self._graph, item.layer
        queries, keys, values = (
            graph.node("Transpose", each, perm=[0, 2, 1, 3]) for each in self._heads(item, qkv)
        )
        queries = rotate(graph, queries, self._cos, self._sin)
        keys = rotate(graph, keys, self._cos, self._sin)
        whole = [
            graph.node(
                "Concat",
                f"past_key_values.{layer}.{part}",
                fresh,
                name=f"present.{layer}.{part}",
                axis=2,
            )
            for part, fresh in (("key", keys), ("value", values))
        ]
        return attend(
            graph, self._shape, self._places, queries, whole[0], whole[1], self._bias(item.window)
        )

    def _fused(self, item: Instruction, qkv: str) -> str:
        """Return what ONNX Runtime's operator makes of queries, keys and values side by side."""
        graph, shape, layer = self._graph, self._shape, item.layer
        parts = [qkv, "", ""]
        if item.q_norm is not None:
            flat = graph.constant([0, 0, -1])
            parts = [graph.node("Reshape", each, flat) for each in self._heads(item, qkv)]
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        out, _, _ = graph.nodes(
            "GroupQueryAttention",
            *parts,
            *past,
            self._last,
            self._total,
            self._cos,
            self._sin,
            "",
            self._bias(item.window),
            names=[
                f"attended.{layer}",
                *(f"present.{layer}.{part}" for part in ("key", "value")),
            ],
            domain=CONTRIB,
            num_heads=shape.num_heads,
            kv_num_heads=shape.num_kv_heads,
            do_rotary=1,
        )
        return out
