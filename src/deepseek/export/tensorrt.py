"""A TensorRT build plan: the ONNX graph, and the command that makes an engine of it on the machine
that will run it, whose GPU and version an engine is bound to.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html and
https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration/tensorrt-10x-to-11x.html (types
come from the graph alone).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Exported, Kind, Progress
from deepseek.export.onnx.graph import MODEL, OPSET
from deepseek.export.onnx.ports import Port, read_ports
from deepseek.export.onnx.standard import write_standard
from deepseek.hub import Bundle

PLAN, SCRIPT, ENGINE = "tensorrt.json", "build.sh", "model.plan"
Precision = Literal["float32", "float16", "bfloat16"]
_LOW = {"float16": "fp16", "bfloat16": "bf16"}
_USUAL = 8
"""Share of the longest text that engines are tuned for, as a divisor."""


class Sizes(NamedTuple):
    """Least, usual and largest value of a free size."""

    min: int
    opt: int
    max: int


Profile = Mapping[str, Sizes]
"""By the names that free sizes have in the graph."""


def write(
    bundle: Bundle,
    folder: Path,
    *,
    precision: Precision = "float32",
    max_tokens: int | None = None,
    max_batch: int = 8,
    progress: Progress | None = None,
) -> Exported:
    """Write `model.onnx`, `tensorrt.json` and `build.sh` in a folder. Is a `Format`'s writer.

    Args:
        bundle: of a model that has a form in ONNX.
        folder: to write into.
        precision: of products in the engine; below float32 the script first casts the graph by
            NVIDIA's ModelOpt. float32 is without TF32.
        max_tokens: longest text with what is cached of it; None for the model's own.
        max_batch: most texts at once.
        progress: told what is being done.

    Raises:
        ConfigError: bounds that the model does not have, or a model that ONNX has no form for.
        MissingExtra: onnx is not installed.
    """
    if precision not in get_args(Precision):
        must = f"one of {', '.join(get_args(Precision))}"
        raise ConfigError(describe("precision", "TensorRT", must, precision))
    if max_batch < 1:
        raise ConfigError(describe("max_batch", "TensorRT", "at least 1", max_batch))
    made = write_standard(bundle, folder, progress)
    longest = max_tokens or made.max_tokens
    if not 2 <= longest <= made.max_tokens:
        must = f"from 2 to {made.max_tokens}, the model's longest text"
        raise ConfigError(describe("max_tokens", "TensorRT", must, longest))
    inputs, _ = read_ports(folder / MODEL)
    profiles = profiles_of(made.kind, longest, max_batch)
    plan = {
        "needs": {
            "TensorRT": "10.12 or newer, with trtexec on the PATH, and its GPU",
            **({"nvidia-modelopt": "with ONNX"} if precision in _LOW else {}),
        },
        "precision": precision,
        "opset": OPSET,
        "profiles": [shapes_of(inputs, each) for each in profiles],
    }
    steps = build_steps(plan)
    (folder / PLAN).write_text(json.dumps({**plan, "steps": steps}, indent=2) + "\n", "utf-8")
    (folder / SCRIPT).write_text(_script(steps), "utf-8")
    (folder / SCRIPT).chmod(0o755)
    note = f"the engine is made by {SCRIPT} where it will run; it was not run here"
    files = (*made.files, folder / PLAN, folder / SCRIPT)
    return Exported("tensorrt", folder, files, (*made.notes, note))


def profiles_of(kind: Kind, max_tokens: int, max_batch: int) -> list[Profile]:
    """Return the profiles that an engine is tuned for: a text that is read whole and, of a decoder,
    a token behind what is cached. In each the three sizes of all inputs fit together."""
    batch = Sizes(1, 1, max_batch)
    usual = max(1, max_tokens // _USUAL)
    text = Sizes(1, usual, max_tokens)
    if kind != "decoder":
        return [{"batch": batch, "tokens": text}]
    one, none = Sizes(1, 1, 1), Sizes(0, 0, 0)
    past = Sizes(1, usual, max_tokens - 1)
    total = Sizes(*(size + 1 for size in past))
    return [
        {"batch": batch, "tokens": text, "past": none, "total": text},
        {"batch": batch, "tokens": one, "past": past, "total": total},
    ]


def shapes_of(inputs: Sequence[Port], profile: Profile) -> dict[str, dict[str, list[int]]]:
    """Return the least, usual and largest shape of each input, by `min`, `opt` and `max`."""

    def shape(port: Port, which: str) -> list[int]:
        return [
            size if isinstance(size, int) else getattr(profile[size], which) for size in port.shape
        ]

    return {which: {port.name: shape(port, which) for port in inputs} for which in Sizes._fields}


def build_steps(plan: Mapping[str, object]) -> list[list[str]]:
    """Return the commands of a plan, each as its arguments, to be run in its folder."""
    precision, profiles = plan["precision"], plan["profiles"]
    assert isinstance(precision, str)
    assert isinstance(profiles, list)
    steps, model = [], MODEL
    if precision in _LOW:
        model = f"model.{_LOW[precision]}.onnx"
        cast = ["python3", "-m", "modelopt.onnx.autocast", "--onnx_path", MODEL]
        cast += ["--output_path", model, "--low_precision_type", _LOW[precision], "--keep_io_types"]
        steps.append(cast)
    build = ["trtexec", f"--onnx={model}", f"--saveEngine={ENGINE}", "--stronglyTyped"]
    build += ["--noTF32", "--skipInference"]
    for number, profile in enumerate(profiles):
        build.append(f"--profile={number}")
        for which in Sizes._fields:
            shapes = (
                f"{name}:{'x'.join(map(str, shape))}" for name, shape in profile[which].items()
            )
            build.append(f"--{which}Shapes={','.join(shapes)}")
    return [*steps, build]


def _script(steps: Sequence[Sequence[str]]) -> str:
    lines = [
        "#!/usr/bin/env bash",
        "# Makes model.plan of model.onnx; run it where the engine will run.",
    ]
    lines += ["set -euo pipefail", 'cd "$(dirname "$0")"', *map(shlex.join, steps)]
    return "\n".join(lines) + "\n"
