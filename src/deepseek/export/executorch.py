"""ExecuTorch programs: `model.pte` for phones and small machines, its products by XNNPACK.

Memory is planned when the program is written, so that batch and length have upper bounds.

Source: https://docs.pytorch.org/executorch/1.5/using-executorch-export.html,
https://docs.pytorch.org/executorch/1.5/backends/xnnpack/xnnpack-quantization.html
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
import weakref
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, FormatError, describe, missing_extra
from deepseek.export.captured import Capture
from deepseek.export.formats import Exported, Kind, Progress
from deepseek.export.graph_reader import GraphReader
from deepseek.export.traced_reader import traced_reader
from deepseek.hub import Bundle
from deepseek.models.families import config_from_hf

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.runtime import Method
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

MODEL = "model.pte"
_METHOD = "forward"
_USUAL_TOKENS = 512
_OPEN: weakref.WeakSet[Method] = weakref.WeakSet()
"""Programs that are open in this process."""


def write(
    bundle: Bundle,
    folder: Path,
    *,
    quantize: Literal["int8"] | None = None,
    max_tokens: int | None = None,
    max_batch: int = 1,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as `model.pte` in a folder. Is a `Format`'s writer.

    Args:
        bundle: its weights are written in float32.
        folder: to write into.
        quantize: round the matrices of products to int8, a scale for each output channel, and
            their inputs while the program runs; embedding and attention stay in float32. None for
            float32 throughout.
        max_tokens: longest text with what is cached of it; None for the model's own, 512 at most:
            memory for the logits of all of it is planned.
        max_batch: most texts at once.
        progress: told what is being done.

    Raises:
        ConfigError: bounds that the model does not have, or a model that is no plain graph.
        MissingExtra: executorch is not installed.
    """
    tell = progress or (lambda words, share: None)
    with _quiet():
        _check_installed()
        longest = max_tokens or min(config_from_hf(bundle.config).max_positions, _USUAL_TOKENS)
        capture = Capture.of(bundle, max_tokens=longest, max_batch=max_batch)
        tell("following the model", None)
        program = capture.follow()
        if quantize is not None:
            tell("rounding weights", None)
            program = capture.follow(_quantized(program, capture.inputs))
        tell("lowering to XNNPACK", None)
        made = _lower(program, quantize)
        tell("writing", None)
        with (folder / MODEL).open("wb") as file:
            made.write_to_file(file)
    bounds = f"at most {max_batch} text{'s' * (max_batch > 1)} of {longest} tokens at once"
    return Exported("executorch", folder, (folder / MODEL,), (*capture.notes, bounds))


def read(folder: Path, *, threads: int | None = None) -> GraphReader:
    """Return the reader of a program. Is a `Format`'s reader.

    Args:
        folder: of `model.pte`, or the file.
        threads: to compute with, which all programs of a process share; None for what they have,
            at first ExecuTorch's own choice.

    Raises:
        ConfigError: other threads than those of a program that is open.
        FormatError: a file that is damaged, or that no export made.
        MissingExtra: executorch is not installed.
    """
    path = folder / MODEL if folder.is_dir() else folder
    with _quiet():
        _check_installed()
        if threads is not None:
            _use_threads(threads)
        method = _load(path)
    about = method.metadata
    inputs = [about.input_tensor_meta(at).sizes() for at in range(about.num_inputs())]
    answer = about.output_tensor_meta(0).sizes()
    if len(inputs) not in (2, 5) or len(answer) not in (2, 3):
        must = "a program that deepseek exported"
        raise FormatError(describe("file", str(path), must, f"{len(inputs)} inputs"))
    rows, tokens = inputs[0]
    kind: Kind = "decoder" if len(inputs) == 5 else "encoder"

    def run(*tensors: Tensor) -> list[Tensor]:
        # what is returned lies in the program's own memory, which the next call writes to
        return [each.clone() for each in method.execute(tensors)]

    return traced_reader(
        run,
        name=f"ExecuTorch {version('executorch')}",
        kind="classifier" if len(answer) == 2 else kind,
        max_tokens=tokens,
        max_batch=rows,
        past=[tuple(sizes) for sizes in inputs[3:]],
    )


def _check_installed() -> None:
    try:
        import executorch.exir  # noqa: F401 (whether it is there)
    except ImportError as error:
        words = "to write and run ExecuTorch programs"
        raise missing_extra("executorch", "executorch", words) from error


def _use_threads(count: int) -> None:
    """Set the threads of a process, whose pool open programs point into."""
    from executorch.extension.pybindings import portable_lib

    had = portable_lib._threadpool_get_thread_count()
    if count == had:
        return
    if _OPEN:
        step = "Close that program, or use another process"
        raise ConfigError(describe("threads", "ExecuTorch", f"{had}, as of one open", count, step))
    portable_lib._unsafe_reset_threadpool(count)


def _load(path: Path) -> Method:
    from executorch.runtime import Runtime

    try:
        found = Runtime.get().load_program(path).load_method(_METHOD)
    except (RuntimeError, OSError) as error:
        got = str(error).splitlines()[0]
        raise FormatError(describe("file", str(path), "a program that is whole", got)) from error
    if found is None:
        raise FormatError(describe("file", str(path), f"one with a method {_METHOD}", "none"))
    _OPEN.add(found)
    return found


def _lower(program: ExportedProgram, quantize: str | None) -> ExecutorchProgramManager:
    """Return a graph as a program: what XNNPACK takes is its, the rest are portable kernels."""
    from executorch.backends.xnnpack.partition.config.gemm_configs import (
        AddmmConfig,
        LinearConfig,
        MMConfig,
    )
    from executorch.backends.xnnpack.partition.config.generic_node_configs import BMMConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.backend.partitioner import Partitioner

    # ExecuTorch 1.5 fixes the batch of what a split returns when it checks the graph
    program = program.run_decompositions({torch.ops.aten.split_with_sizes.default: _split})
    parts: list[Partitioner] = [XnnpackPartitioner()]
    if quantize is not None:
        # Its merging of pieces tries all pairs: between int8 products, the hundreds of sums and
        # factors of a 30-layer model take it hours. So products alone are its own.
        products = [LinearConfig, AddmmConfig, MMConfig, BMMConfig]
        parts = [
            XnnpackDynamicallyQuantizedPartitioner(),
            XnnpackPartitioner(configs=products),
        ]
    return to_edge_transform_and_lower(program, partitioner=parts).to_executorch()


def _split(states: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Return parts of a tensor by slices, which is what a split means."""
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return [states.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _quantized(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Return a graph with int8 matrices, by channels, whose inputs are rounded while it runs."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    graph = cast("GraphModule", program.module())
    prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
    prepared(*inputs)
    return convert_pt2e(prepared)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ExecuTorch and its parts say of themselves from the user."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
