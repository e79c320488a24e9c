"""A decoder divided over the processes of a mesh, and its passes for training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek.errors import ShapeError, describe
from deepseek.models.decoder import Decoder
from deepseek.models.splits import check_mesh, decoder_splits
from deepseek.models.stage import DecoderStage, layers_of
from deepseek.parallel import Grid, Pipeline, shard_model, split_model


class DividedDecoder:
    """The part of a decoder that this process holds, and how it computes with the others."""

    def __init__(self, decoder: Decoder, grid: Grid) -> None:
        """Divide a decoder in place; every process does so together, with the same weights.

        Args:
            decoder: whole. Afterwards it holds this process's part, under the same names.
            grid: the mesh.

        Raises:
            ConfigError: it cannot be divided so.
        """
        check_mesh(decoder.config, grid.mesh)
        num_layers = decoder.config.num_layers
        first, stop = layers_of(num_layers, grid.place("pipeline"), grid.size("pipeline"))
        self.decoder, self.grid = decoder, grid
        with torch.device("meta"):
            self.whole = Decoder(decoder.config)
            """What the decoder was, without its weights."""
        self.stage = DecoderStage(decoder, first, stop)
        self.axes = split_model(decoder, decoder_splits(decoder.config), grid)
        """For each parameter the axes along which its gradient is still to be added up."""
        shard_model(self.stage, [f"decoder.model.layers.{n}" for n in range(first, stop)], grid)
        self._pipelines: dict[tuple[int, ...], Pipeline] = {}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that this process has a part of, by their names in the whole."""
        return list(self.decoder.named_parameters())

    def backward(self, tokens: Tensor, labels: Tensor, num_parts: int, factor: float) -> Tensor:
        """Add to the gradients those of this process's samples. Return their loss, float32 [1]:
        on the last stage, zero on the others.

        Every process must give as many parts, with a mesh of stages of one size.

        Args:
            tokens: int64 [B, T]; processes that differ in `tensor` and `pipeline` alone give the
                same.
            labels: int64 [B, T], -100 where none counts.
            num_parts: how often the model is run; divides B.
            factor: of the sum of the cross-entropies.

        Raises:
            ShapeError: the parts would differ in size.
        """
        if len(tokens) % num_parts:
            must = f"a multiple of the {num_parts} parts"
            raise ShapeError(describe("rows of tokens", "DividedDecoder", must, len(tokens)))
        if self.grid.size("pipeline") > 1:
            return self._pipeline(tokens, num_parts).run(tokens, labels, factor)
        loss = torch.zeros(1)
        for part, wanted in zip(tokens.chunk(num_parts), labels.chunk(num_parts), strict=True):
            value = self.stage(part, wanted) * factor
            value.backward()
            loss += value.detach()
        return loss

    def _pipeline(self, tokens: Tensor, num_parts: int) -> Pipeline:
        shape = (len(tokens) // num_parts, tokens.shape[1], self.decoder.config.hidden_size)
        key = (*shape, num_parts)
        if key not in self._pipelines:
            made = Pipeline(self.stage, self.grid, shape=shape, num_parts=num_parts)
            self._pipelines[key] = made
        return self._pipelines[key]
