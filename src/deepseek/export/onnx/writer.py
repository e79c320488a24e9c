"""Writes a bundle as an ONNX model: a decoder that keeps its keys and values, an encoder or a
classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Exported, Progress, kind_of
from deepseek.export.onnx.decoder import FUSED_MULTIPLE, DecoderGraph
from deepseek.export.onnx.encoder import EncoderGraph
from deepseek.export.onnx.graph import GraphWriter
from deepseek.export.onnx.quantized import Activations, GridProducts, Grids
from deepseek.export.onnx.rounding import GROUP, int4_groups, int8_rows
from deepseek.export.onnx.weights import FloatProducts, Values, required
from deepseek.generate.flat import decoder_program, why_not_flat
from deepseek.generate.flat_encoder import encoder_program
from deepseek.graph import Program
from deepseek.hub import Bundle
from deepseek.hub import load as load_bundle
from deepseek.hub.grids import grids_of, words_of
from deepseek.models import Decoder, Encoder, RoutedPlanner
from deepseek.models.single_weights import weight_of
from deepseek.ops.grid import Floats, GridSource

Quantize = Literal["int8", "int4"]


def write(
    bundle: Bundle,
    folder: Path,
    *,
    optimize: bool = False,
    quantize: Quantize | None = None,
    activations: Activations = "int8",
    progress: Progress | None = None,
) -> Exported:
    """Write a bundle as `model.onnx` and `model.onnx.data` in a folder. Is a `Format`'s writer.

    Weights that the bundle holds on grids keep their codes, always.

    Args:
        bundle: what to write.
        folder: where the files go.
        optimize: attention is the one operator that ONNX Runtime has for it; other runtimes do not
            read that.
        quantize: round weights of no grid: int8 by rows, or int4 in groups of 32 with embedding and
            head in int8. None leaves them in float32.
        activations: what the inputs of products with weights on grids are rounded to.
        progress: called with what is done, and the share of it.

    Raises:
        ConfigError: a model whose mathematics has no form here, or weights that have been quantized
            already.
        MissingExtra: onnx is not installed.
        FormatError: a folder that is not a whole model.
    """
    if quantize is not None and bundle.grids:
        must = "None for weights that lie on grids already, whose codes the file keeps"
        raise ConfigError(describe("quantize", "ONNX", must, quantize))
    report = progress or (lambda words, share: None)
    with GraphWriter(folder) as graph:
        model = load_bundle(bundle.path)
        program = program_of(model)
        values, grids = values_of(model), _grids_of(bundle, program, quantize, values_of(model))
        products = FloatProducts(graph, values)
        if grids is not None:
            products = GridProducts(graph, values, grids, activations)
        longest = model.config.max_positions
        if isinstance(model, Decoder):
            fuses = optimize and model.config.head_dim % FUSED_MULTIPLE == 0
            graph_of = DecoderGraph(graph, program, products, longest, fuses=fuses)
        else:
            graph_of = EncoderGraph(graph, program, products, fuses=optimize)
        graph_of.write(lambda share: report("writing weights", share))
        about = {"kind": kind_of(bundle), "max_tokens": str(longest), "activations": activations}
        files = graph.write(about)
    return Exported("onnx", folder, tuple(files), tuple(_notes(bundle, model, quantize, optimize)))


def program_of(model: Decoder | Encoder) -> Program:
    """Return the program of a model that the graph can say.

    Raises:
        ConfigError: it has no flat program, or experts.
    """
    if isinstance(model, Encoder):
        return encoder_program(model.config)
    reason = why_not_flat(model.config)
    if reason is None and model.config.experts is not None:
        reason = "a mixture of experts has no form in ONNX that computes the chosen ones alone"
    if reason is not None:
        step = "Serve it with deepseek, or export another model"
        raise ConfigError(describe("model", "ONNX", "one the graph can say", reason, step))
    return decoder_program(model.config)


def values_of(model: nn.Module) -> Values:
    """Return what gives the weights of a model in float32, by their names."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def values(name: str) -> Floats | None:
        if name not in names:
            return None
        return weight_of(model, name).to(torch.float32).contiguous().numpy()

    return values


def _grids_of(
    bundle: Bundle, program: Program, quantize: Quantize | None, values: Values
) -> Grids | None:
    """Return what gives the grids of weights: the bundle's own, or what they are rounded to."""
    if bundle.grids:
        return grids_of(bundle).get
    if quantize is None:
        return None
    used = [item for item in program.instructions if item.weights]
    matrices = {name for item in used if not item.is_exact for name in item.weights}
    tables = {name for item in used if item.op == "embed" or item.is_head for name in item.weights}

    def rounded(name: str) -> GridSource | None:
        if name not in matrices:
            return None
        weight = required(values, name)
        is_wide = quantize == "int8" or name in tables or weight.shape[1] % GROUP
        return int8_rows(weight) if is_wide else int4_groups(weight)

    return rounded


def _notes(
    bundle: Bundle, model: Decoder | Encoder, quantize: Quantize | None, optimize: bool
) -> list[str]:
    notes = []
    if optimize and isinstance(model, Decoder) and model.config.head_dim % FUSED_MULTIPLE:
        size = model.config.head_dim
        notes.append(f"attention is not fused: ONNX Runtime does not fuse heads of {size} channels")
    if bundle.grids:
        notes.append(f"weights keep their grids: {words_of(bundle.grids)}")
    if quantize is not None:
        notes.append(f"weights were rounded to {quantize} here, without calibration")
    if isinstance(model, Decoder) and isinstance(model.planner, RoutedPlanner):
        notes.append("every token sees all before it: the bundle's routing is not in the file")
    return notes
