"""Inputs and outputs of an ONNX file, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Port(NamedTuple):
    """An input or output of a graph."""

    name: str
    kind: str
    """`TensorProto.DataType` by name: INT64, FLOAT."""
    shape: tuple[int | str, ...]
    """Sizes; the free ones by name."""


def read_ports(path: Path) -> tuple[list[Port], list[Port]]:
    """Return inputs and outputs, in the order of the file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph

    def port(value: onnx.ValueInfoProto) -> Port:
        held = value.type.tensor_type
        shape = tuple(each.dim_param or each.dim_value for each in held.shape.dim)
        return Port(value.name, onnx.TensorProto.DataType.Name(held.elem_type), shape)

    return [port(each) for each in graph.input], [port(each) for each in graph.output]
