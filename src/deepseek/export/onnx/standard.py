"""A bundle as an ONNX graph of the standard's own operators alone, which other runtimes than ONNX
Runtime read too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from deepseek.export.formats import Kind, Progress, kind_of
from deepseek.export.onnx.decoder import DecoderGraph
from deepseek.export.onnx.encoder import EncoderGraph
from deepseek.export.onnx.graph import GraphWriter
from deepseek.export.onnx.weights import FloatProducts
from deepseek.export.onnx.writer import program_of, values_of
from deepseek.hub import Bundle, load
from deepseek.models import Decoder


class StandardGraph(NamedTuple):
    """What was written."""

    files: tuple[Path, ...]
    kind: Kind
    max_tokens: int
    notes: tuple[str, ...]


def write_standard(bundle: Bundle, folder: Path, progress: Progress | None = None) -> StandardGraph:
    """Write a bundle as `model.onnx` and `model.onnx.data`, float32 throughout.

    Args:
        bundle: weights on grids are written as the numbers that they stand for.
        folder: where the files go.
        progress: called with what is done, and the share of it.

    Raises:
        ConfigError: a model whose mathematics has no form in ONNX.
        MissingExtra: onnx is not installed.
        FormatError: a folder that is not a whole model.
    """
    report = progress or (lambda words, share: None)
    model, kind = load(bundle.path), kind_of(bundle)
    longest = model.config.max_positions
    with GraphWriter(folder) as graph:
        program, products = program_of(model), FloatProducts(graph, values_of(model))
        if isinstance(model, Decoder):
            made = DecoderGraph(graph, program, products, longest, fuses=False)
        else:
            made = EncoderGraph(graph, program, products, fuses=False)
        made.write(lambda share: report("writing weights", share))
        files = graph.write({"kind": kind, "max_tokens": str(longest)})
    note = "weights on grids of integers are written as the numbers that they stand for"
    return StandardGraph(tuple(files), kind, longest, (note,) if bundle.grids else ())
