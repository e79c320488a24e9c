"""Turns a model's tensors into those of a layout of weights on grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.hub import compressed_tensors, gptq
from deepseek.ops.grid import Grid
from deepseek.ops.quantized import QuantizedWeight


def quantized_tensors(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, QuantizedWeight],
    layout: Literal["compressed-tensors", "gptq"],
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return the `quantization_config` of a model and the tensors of its files, one after another.

    Args:
        tensors: the model's, by their names in a checkpoint.
        weights: those on a grid; every other tensor is given in the shortest dtype that holds it.
        layout: in which the weights are written.

    Raises:
        ConfigError: a weight is none of the model's, has another shape, or does not fit the layout.
    """
    for name, weight in weights.items():
        given = tensors.get(name)
        if given is None or given.shape != weight.codes.shape:
            must = f"a matrix of the model of its shape {list(weight.codes.shape)}"
            got = "no such weight" if given is None else list(given.shape)
            raise ConfigError(describe(f"quantized weight {name!r}", "save", must, got))
    if layout == "gptq":
        return _as_gptq(tensors, {name: weight.grid() for name, weight in weights.items()})
    others = [name for name, value in tensors.items() if value.dim() == 2 and name not in weights]
    is_tied = "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    if is_tied:
        others.append("lm_head.weight")  # a linear layer without a weight of its own
    settings = {
        name: compressed_tensors.grid_settings(name, weight.grid())
        for name, weight in weights.items()
    }
    config = compressed_tensors.write_config(settings, others, has_tied_head=is_tied)
    return config, _each(tensors, weights)


def _each(
    tensors: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]
) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors.items():
        if name not in weights:
            yield name, shortest(value)
            continue
        for part, array in compressed_tensors.write_grid(name, weights[name].grid()):
            yield part, torch.from_numpy(array)


def _as_gptq(
    tensors: Mapping[str, Tensor], grids: Mapping[str, Grid]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    offset = gptq.offset_for(grids)
    config = gptq.write_config(grids, offset)

    def each() -> Iterator[tuple[str, Tensor]]:
        for name, value in tensors.items():
            if name not in grids:
                yield name, shortest(value)
                continue
            for part, array in gptq.write_weight(name, grids[name], offset):
                yield part, torch.from_numpy(array)

    return config, each()


def shortest(value: Tensor) -> Tensor:
    """Return a tensor in the first of bfloat16 and float16 that holds its numbers, else as it
    is."""
    if value.dtype is torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            short = value.to(dtype)
            if torch.equal(short.float(), value):
                return short
    return value
