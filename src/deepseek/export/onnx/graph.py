"""Writes an ONNX graph node by node; large tensors go to a file beside it as they are made.

A model of any size is written with the memory of its largest tensor: protobuf holds no more than
2 GiB, and readers map the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deepseek.errors import missing_extra

if TYPE_CHECKING:
    import onnx

MODEL, DATA = "model.onnx", "model.onnx.data"
OPSET, CONTRIB = 21, "com.microsoft"
_PAGE = 4096
_INLINE_BYTES = 1024
Array = npt.NDArray[np.generic]


class GraphWriter:
    """A graph that grows; a context manager, which closes its data file."""

    def __init__(self, folder: Path) -> None:
        """Open the data file in a folder.

        Raises:
            MissingExtra: onnx is not installed.
        """
        try:
            import onnx
        except ImportError as error:
            raise missing_extra("onnx", "export", "to write ONNX files") from error
        self._onnx = onnx
        self._folder = folder
        self._data = (folder / DATA).open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}
        self._has_contrib = False

    def __enter__(self) -> GraphWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._data.close()

    def node(
        self, op: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output and return the output's name.

        Args:
            op: its type.
            inputs: names of values; empty for one that is left out.
            name: of the output; None for one that is made up.
            domain: of the operator; empty for ONNX's own.
            attributes: of the operator.
        """
        return self.nodes(
            op, *inputs, names=[name or self._fresh(op)], domain=domain, **attributes
        )[0]

    def nodes(
        self,
        op: str,
        *inputs: str,
        outputs: int = 1,
        names: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs and return their names; arguments as in `node`."""
        made = list(names) if names else [self._fresh(op) for _ in range(outputs)]
        self._has_contrib |= domain == CONTRIB
        made_node = self._onnx.helper.make_node(
            op, list(inputs), made, name=f"{op}:{made[0]}", domain=domain, **attributes
        )
        self._nodes.append(made_node)
        return made

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """Return the name of a small constant; equal ones are one."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._fresh("constant")
            self._tensors[name] = self._onnx.numpy_helper.from_array(array, name)
            self._constants[key] = name
        return self._constants[key]

    def has_tensor(self, name: str) -> bool:
        """Return whether a tensor of this name was written."""
        return name in self._tensors

    def tensor(self, name: str, values: Array, kind: int | None = None) -> str:
        """Write a tensor under a name and return the name.

        Args:
            name: of its own.
            values: in the layout of the file; of four bits two to a byte.
            kind: `TensorProto.DataType` where it is none of numpy's, with `values` [..., bytes].
        """
        helper, array = self._onnx.helper, np.ascontiguousarray(values)
        shape = list(array.shape)
        if kind is None:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        else:
            shape[-1] *= 2
        made = self._onnx.TensorProto(name=name, data_type=kind, dims=shape)
        if array.nbytes <= _INLINE_BYTES:
            made.raw_data = array.tobytes()
        else:
            self._data.write(b"\0" * (-self._data.tell() % _PAGE))
            place = {"location": DATA, "offset": self._data.tell(), "length": array.nbytes}
            made.data_location = self._onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                made.external_data.add(key=key, value=str(value))
            array.tofile(self._data)
        self._tensors[name] = made
        return name

    def input(self, name: str, kind: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Add an input of the graph and return its name; dimensions with names are free."""
        self._inputs.append(self._value(name, kind, shape))
        return name

    def output(self, name: str, kind: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        self._outputs.append(self._value(name, kind, shape))

    def write(self, about: dict[str, str]) -> list[Path]:
        """Write the model and return its files.

        Args:
            about: what its metadata says.
        """
        from importlib.metadata import version

        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes, "model", self._inputs, self._outputs, list(self._tensors.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if self._has_contrib:
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=10,
            producer_name="deepseek",
            producer_version=version("deepseek-stack"),
        )
        helper.set_model_props(model, about)
        path = self._folder / MODEL
        path.write_bytes(model.SerializeToString())
        self._data.close()
        self._onnx.checker.check_model(str(path), full_check=not self._has_contrib)
        return [path, self._folder / DATA]

    def _value(
        self, name: str, kind: npt.DTypeLike, shape: Sequence[int | str]
    ) -> onnx.ValueInfoProto:
        helper = self._onnx.helper
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape
        )

    def _fresh(self, op: str) -> str:
        count = self._counts[op] = self._counts.get(op, -1) + 1
        return f"{op.lower()}_{count}"
