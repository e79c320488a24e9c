"""OpenVINO's IR: `model.xml` and `model.bin`, made of the ONNX graph by OpenVINO itself.

Source: https://docs.openvino.ai/2026/documentation/openvino-ir-format.html
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast, get_args

import numpy as np

from deepseek.errors import ConfigError, FormatError, describe, missing_extra
from deepseek.export.formats import Exported, Kind, Progress
from deepseek.export.graph_reader import GraphReader, Run
from deepseek.export.onnx.decoder import LAST
from deepseek.export.onnx.graph import MODEL as ONNX_MODEL
from deepseek.export.onnx.standard import write_standard
from deepseek.hub import Bundle

if TYPE_CHECKING:
    import openvino

MODEL, WEIGHTS = "model.xml", "model.bin"
_MAX_BATCH = 1024
_ABOUT, _KIND, _MAX_TOKENS = "deepseek", "kind", "max_tokens"
_PAST, _LAYER = "past_key_values.", "layers."


def write(bundle: Bundle, folder: Path, *, progress: Progress | None = None) -> Exported:
    """Write a model as IR in a folder, float32. Is a `Format`'s writer.

    Args:
        bundle: of a model that has a form in ONNX.
        folder: to write into.
        progress: told what is being done.

    Raises:
        ConfigError: a model that ONNX has no form for, or operators that OpenVINO does not read.
        MissingExtra: openvino or onnx is not installed.
    """
    runtime = _runtime()
    beside = folder / "onnx"
    beside.mkdir()
    made = write_standard(bundle, beside, progress)
    if progress is not None:
        progress("converting", None)
    try:
        model = runtime.Core().read_model(str(beside / ONNX_MODEL))
    except RuntimeError as error:
        must = "of operators that OpenVINO reads"
        raise ConfigError(describe("model", "OpenVINO", must, _cause(error))) from error
    model.set_rt_info(made.kind, [_ABOUT, _KIND])
    model.set_rt_info(str(made.max_tokens), [_ABOUT, _MAX_TOKENS])
    runtime.save_model(model, str(folder / MODEL), compress_to_fp16=False)
    del model  # which has the ONNX files open
    shutil.rmtree(beside)
    return Exported("openvino", folder, (folder / MODEL, folder / WEIGHTS), made.notes)


def read(folder: Path, *, threads: int | None = None) -> GraphReader:
    """Return the reader of an IR, which computes in float32 on the CPU. Is a `Format`'s reader.

    Args:
        folder: of `model.xml` and `model.bin`, or the former.
        threads: to compute with; None for OpenVINO's own choice.

    Raises:
        FormatError: files that are damaged, or that no export made.
        MissingExtra: openvino is not installed.
    """
    runtime = _runtime()
    path = folder / MODEL if folder.is_dir() else folder
    core, about = runtime.Core(), dict[str, str]()
    try:
        model = core.read_model(str(path))
        for key in (_KIND, _MAX_TOKENS):
            about[key] = str(model.get_rt_info([_ABOUT, key]).value)
    except RuntimeError as error:
        must = "an IR that is whole, and that an export made"
        raise FormatError(describe("file", str(path), must, _cause(error))) from error
    if about[_KIND] not in get_args(Kind) or not about[_MAX_TOKENS].isdigit():
        raise FormatError(describe("file", str(path), "one that deepseek exported", about))
    # bfloat16 is the default where a processor has it
    settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    names = [port.get_any_name() for port in model.inputs]
    past = [name for name in names if name.startswith(_PAST)]
    answer = "last_hidden_state" if about[_KIND] == "encoder" else "logits"

    def compiled(outputs: Sequence[str]) -> Run:
        """Return what computes values by name, of the graph with these outputs."""
        graph = core.read_model(str(path))
        has = {name for port in graph.outputs for name in port.get_names()}
        graph.add_outputs([name for name in outputs if name not in has])
        return _runner(core.compile_model(graph, "CPU", settings), past, outputs)

    def empty(rows: int) -> list[np.ndarray]:
        shapes = (model.input(name).get_partial_shape() for name in past)
        sizes = ((shape[1].get_length(), shape[3].get_length()) for shape in shapes)
        return [np.zeros((rows, heads, 0, dim), np.float32) for heads, dim in sizes]

    layers = functools.cache(lambda: compiled(_layers(model, about[_KIND])))
    return GraphReader(
        name=f"OpenVINO {runtime.__version__.partition('-')[0]}",
        kind=cast("Kind", about[_KIND]),
        max_tokens=int(about[_MAX_TOKENS]),
        max_batch=_MAX_BATCH,
        run=compiled([answer, *(name.replace(_PAST, "present.") for name in past)]),
        empty=empty if past else None,
        run_layers=lambda inputs: layers()(inputs),
    )


def _runner(model: openvino.CompiledModel, past: Sequence[str], outputs: Sequence[str]) -> Run:
    """Return what computes outputs by name from ids, mask and what is kept."""
    has_types = any("token_type_ids" in port.get_names() for port in model.inputs)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        ids, mask, *kept = inputs
        feeds = {"input_ids": ids, "attention_mask": mask, **dict(zip(past, kept, strict=True))}
        if has_types:
            feeds["token_type_ids"] = np.zeros_like(ids)
        found = model.create_infer_request().infer(feeds)
        return [found[name] for name in outputs]

    return run


def _layers(model: openvino.Model, kind: str) -> list[str]:
    """Return the names of the states behind each layer, a decoder's last one normed."""
    ports = (port for op in model.get_ordered_ops() for port in op.outputs())
    named = {name for port in ports for name in port.get_names() if name.startswith(_LAYER)}
    ordered = sorted(named, key=lambda name: int(name.split(".")[1]))
    return [*ordered[:-1], LAST] if kind == "decoder" else ordered


def _runtime() -> ModuleType:
    try:
        import openvino
    except ImportError as error:
        raise missing_extra("openvino", "openvino", "to write and run OpenVINO's IR") from error
    return openvino


def _cause(error: RuntimeError) -> str:
    """Return the last line of what OpenVINO says: the cause stands there."""
    return str(error).strip().splitlines()[-1]
