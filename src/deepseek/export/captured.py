"""A bundle's model as PyTorch's exported graph, of any batch and length up to a bound."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch.export import Dim, ExportedProgram

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Kind, kind_of
from deepseek.export.traced import TracedDecoder, TracedEncoder, past_shapes
from deepseek.hub import Bundle, load
from deepseek.models import Decoder, WindowPlanner

_BATCH, _TOKENS, _PAST = 2, 5, 3
"""Of the example that is followed; all different, and none that a graph could take for special."""


class Captured(NamedTuple):
    """What was captured of a model."""

    program: ExportedProgram
    """Inputs and outputs as `TracedDecoder` or `TracedEncoder` has them."""
    inputs: tuple[torch.Tensor, ...]
    """Of the example that was followed."""
    kind: Kind
    max_tokens: int
    notes: tuple[str, ...]


def capture(bundle: Bundle, *, max_tokens: int | None, max_batch: int) -> Captured:
    """Return the graph of a bundle's model, its weights in float32.

    Args:
        bundle: of a decoder, an encoder or a classifier.
        max_tokens: longest text with what is cached of it; None for the model's own.
        max_batch: most texts at once.

    Raises:
        ConfigError: bounds that the model does not have, or a model that is no plain graph.
    """
    model = load(bundle.path, dtype="float32").eval().requires_grad_(False)
    longest = model.config.max_positions
    must = f"from 4 to {longest}, the model's longest text"
    if max_tokens is not None and not 4 <= max_tokens <= longest:
        raise ConfigError(describe("max_tokens", "export", must, max_tokens))
    if max_batch < 1:
        raise ConfigError(describe("max_batch", "export", "at least 1", max_batch))
    longest = max_tokens or longest
    rows = min(_BATCH, max_batch)
    batch: object = Dim("batch", min=1, max=max_batch) if max_batch > 1 else Dim.STATIC
    tokens = Dim("tokens", min=1, max=longest)
    ids = torch.ones(rows, _TOKENS, dtype=torch.int64)
    if isinstance(model, Decoder):
        _check_planner(model)
        graph: torch.nn.Module = TracedDecoder(model)
        shapes = past_shapes(model.config, rows, _PAST)
        past_mask, past = torch.ones(rows, _PAST, dtype=torch.int64), map(torch.zeros, shapes)
        inputs = ids, torch.ones_like(ids), past_mask, *past
        length = Dim("past", min=0, max=longest)
        read, cached = {0: batch, 1: tokens}, {1: batch, 3: length}
        bounds: tuple[object, ...] = read, read, {0: batch, 1: length}, cached, cached
    else:
        graph = TracedEncoder(model)
        inputs = ids, torch.ones_like(ids)
        bounds = {0: batch, 1: tokens}, {0: batch, 1: tokens}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own parts
        program = torch.export.export(graph.eval(), inputs, dynamic_shapes=bounds, strict=False)
    notes = ("weights on grids of integers are written as the numbers that they stand for",)
    return Captured(program, inputs, kind_of(bundle), longest, notes if bundle.grids else ())


def _check_planner(model: Decoder) -> None:
    """Refuse a choice of blocks while it runs, which no graph of tensors has."""
    if model.planner is not None and not isinstance(model.planner, WindowPlanner):
        must, got = "dense, or of windows", type(model.planner).__name__
        raise ConfigError(describe("attention", "export", must, got))
