"""Triton model repositories: the ONNX graph and a `config.pbtxt` that says its inputs and outputs.

Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/
(model_repository, model_configuration); `model_config.proto` of triton-inference-server/common.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Exported, Progress
from deepseek.export.onnx.graph import MODEL
from deepseek.export.onnx.ports import Port, read_ports
from deepseek.export.onnx.standard import write_standard
from deepseek.hub import Bundle

CONFIG = "config.pbtxt"
_TYPES = {"INT64": "TYPE_INT64", "FLOAT": "TYPE_FP32"}


def write(
    bundle: Bundle, folder: Path, *, max_batch: int = 8, progress: Progress | None = None
) -> Exported:
    """Write a model repository with one model, version 1. Is a `Format`'s writer.

    The folder is the repository. Triton's ONNX Runtime backend runs the model; requests of the same
    shape share a batch where the model keeps nothing.

    Args:
        bundle: of a model that has a form in ONNX.
        folder: to write into.
        max_batch: most rows of a request, or of several together.
        progress: told what is being done.

    Raises:
        ConfigError: `max_batch` below 1, or a model that ONNX has no form for.
        MissingExtra: onnx is not installed.
    """
    if max_batch < 1:
        raise ConfigError(describe("max_batch", "Triton", "at least 1", max_batch))
    name = model_name(bundle.card.name)
    # a model of several files is a folder with the name that a single file would have
    place = folder / name / "1" / MODEL
    place.mkdir(parents=True)
    made = write_standard(bundle, place, progress)
    inputs, outputs = read_ports(place / MODEL)
    config = folder / name / CONFIG
    text = config_text(name, inputs, outputs, max_batch=max_batch, keeps=made.kind == "decoder")
    config.write_text(text, encoding="utf-8")
    return Exported("triton", folder, (config, *made.files), made.notes)


def model_name(name: str) -> str:
    """Return the name under which a server offers a model: letters, digits, `_`, `-` and `.`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"


def config_text(
    name: str, inputs: Sequence[Port], outputs: Sequence[Port], *, max_batch: int, keeps: bool
) -> str:
    """Return the text of a `config.pbtxt`.

    Args:
        name: of the model, and of its folder.
        inputs, outputs: of the graph; the first size of each is the batch's.
        max_batch: most rows.
        keeps: whether outputs come back as inputs: requests of different texts do not have the same
            shape then, and none waits for another.
    """
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f'default_model_filename: "{MODEL}"',
        f"max_batch_size: {max_batch}",
    ]
    for field, ports in (("input", inputs), ("output", outputs)):
        lines += [line for port in ports for line in _port(field, port)]
    if not keeps:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _port(field: str, port: Port) -> Iterator[str]:
    sizes = ", ".join(str(size if isinstance(size, int) else -1) for size in port.shape[1:])
    yield f"{field} {{"
    yield f"  name: {_quoted(port.name)}"
    yield f"  data_type: {_TYPES[port.kind]}"
    yield f"  dims: [ {sizes} ]"
    yield "}"


def _quoted(text: str) -> str:
    """Return a string of protobuf's text format: bytes that are no plain letters in octal."""
    plain = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode()
    )
    return f'"{"".join(plain)}"'
