"""A bundle's model as PyTorch's exported graph, of any batch and length up to a bound."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Kind, kind_of
from deepseek.export.traced import TracedDecoder, TracedEncoder, past_shapes
from deepseek.hub import Bundle, load
from deepseek.models import Decoder, Encoder, RoutedPlanner

_BATCH, _TOKENS, _PAST = 7, 5, 3
"""Of the example that is followed; all different, and none that a graph could take for special."""
_LEAST = _TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """A model that is to be followed: its graph, an example, and how far sizes may go."""

    graph: nn.Module
    """A `TracedDecoder` or `TracedEncoder`."""
    inputs: tuple[Tensor, ...]
    """Of the example."""
    bounds: tuple[object, ...]
    """Sizes of each input that are free."""
    kind: Kind
    max_tokens: int
    max_batch: int
    notes: tuple[str, ...]

    @classmethod
    def of(cls, bundle: Bundle, *, max_tokens: int | None, max_batch: int) -> Capture:
        """Return what is to be followed of a bundle's model, its weights in float32.

        Args:
            bundle: of a decoder, an encoder or a classifier.
            max_tokens: longest text with what is cached of it; None for the model's own.
            max_batch: most texts at once.

        Raises:
            ConfigError: bounds that the model does not have, or a model that is no plain graph.
        """
        model = load(bundle.path, dtype="float32").eval().requires_grad_(False)
        longest = model.config.max_positions
        if max_tokens is not None and not _LEAST <= max_tokens <= longest:
            must = f"from {_LEAST} to {longest}, the model's longest text"
            raise ConfigError(describe("max_tokens", "export", must, max_tokens))
        if max_batch < 1:
            raise ConfigError(describe("max_batch", "export", "at least 1", max_batch))
        longest = max_tokens or longest
        parts = _decoder if isinstance(model, Decoder) else _encoder
        graph, inputs, bounds = parts(model, longest, max_batch)
        return cls(
            graph=graph.eval(),
            inputs=inputs,
            bounds=bounds,
            kind=kind_of(bundle),
            max_tokens=longest,
            max_batch=max_batch,
            notes=tuple(_notes(bundle, model)),
        )

    def follow(self, module: nn.Module | None = None) -> ExportedProgram:
        """Return the graph that PyTorch sees in the model, or in another module that takes the
        same inputs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about its own parts
            return torch.export.export(
                module or self.graph, self.inputs, dynamic_shapes=self.bounds, strict=False
            )


_Parts = tuple[nn.Module, tuple[Tensor, ...], tuple[object, ...]]


def _decoder(model: Decoder | Encoder, longest: int, max_batch: int) -> _Parts:
    assert isinstance(model, Decoder)
    ids, batch, tokens = _ids(longest, max_batch)
    rows = len(ids)
    past = map(torch.zeros, past_shapes(model.config, rows, _PAST))
    past_mask = torch.ones(rows, _PAST, dtype=torch.int64)
    length = Dim("past", min=0, max=longest)
    read, cached = {0: batch, 1: tokens}, {1: batch, 3: length}
    bounds = read, read, {0: batch, 1: length}, cached, cached
    return TracedDecoder(model), (ids, torch.ones_like(ids), past_mask, *past), bounds


def _encoder(model: Decoder | Encoder, longest: int, max_batch: int) -> _Parts:
    assert isinstance(model, Encoder)
    ids, batch, tokens = _ids(longest, max_batch)
    read = {0: batch, 1: tokens}
    return TracedEncoder(model), (ids, torch.ones_like(ids)), (read, read)


def _ids(longest: int, max_batch: int) -> tuple[Tensor, object, object]:
    """Return ids of the example, and what is free of rows and tokens."""
    batch = Dim("batch", min=1, max=max_batch) if max_batch > 1 else Dim.STATIC
    ids = torch.ones(min(_BATCH, max_batch), _TOKENS, dtype=torch.int64)
    return ids, batch, Dim("tokens", min=1, max=longest)


def _notes(bundle: Bundle, model: Decoder | Encoder) -> list[str]:
    notes = []
    if bundle.grids:
        notes.append("weights on grids of integers are written as the numbers that they stand for")
    if isinstance(model, Decoder) and isinstance(model.planner, RoutedPlanner):
        notes.append("every token sees all before it: the bundle's routing is not in the file")
    return notes
