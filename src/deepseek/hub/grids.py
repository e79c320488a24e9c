"""Weights on a grid of integers in a bundle, in any layout that is read. Importing this loads no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.errors import FormatError, describe
from deepseek.hub import compressed_tensors, gptq
from deepseek.hub.safetensors import TensorEntry
from deepseek.hub.stored_grid import StoredGrid
from deepseek.models.families import config_from_hf, our_name

if TYPE_CHECKING:
    from deepseek.hub.bundle import Bundle
    from deepseek.ops.quantized import QuantizedWeight

_READERS = {compressed_tensors.METHOD: compressed_tensors, gptq.METHOD: gptq}


def read_grids(
    folder: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> Mapping[str, StoredGrid]:
    """Return the weights on a grid in a folder, by their names in the checkpoint; nothing where
    `config.json` names no quantization.

    Args:
        folder: the model folder.
        config: the content of `config.json`.
        entries: what `read_entries` gave.

    Raises:
        FormatError: a layout that is not read here, or tensors that do not fit it.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method not in _READERS:
        must = f"one of {', '.join(_READERS)}"
        step = "Take the folder of the model before it was quantized"
        raise FormatError(describe("quant_method", str(folder / "config.json"), must, method, step))
    return _READERS[method].read_grids(folder, quantization, entries)


def without_grids(
    entries: Mapping[str, TensorEntry], grids: Mapping[str, StoredGrid]
) -> dict[str, TensorEntry]:
    """Return the entries of a folder that are no part of a weight on a grid."""
    parts = {
        (entry.file, entry.offset, entry.shape)
        for grid in grids.values()
        for entry in grid.parts.values()
    }
    return {
        name: entry
        for name, entry in entries.items()
        if (entry.file, entry.offset, entry.shape) not in parts
    }


def grids_of(bundle: Bundle) -> dict[str, StoredGrid]:
    """Return the weights of a bundle that lie on a grid, by our own names, yet to be read.

    Raises:
        FormatError: a layout that is not read here, or tensors that do not fit it.
    """
    config = config_from_hf(bundle.config)
    named = {our_name(config, name): grid for name, grid in bundle.grids.items()}
    return {name: grid for name, grid in named.items() if name is not None}


def quantized_weights(bundle: Bundle) -> dict[str, QuantizedWeight]:
    """Return the weights of a bundle that lie on a grid, by the model's names, exactly as they were
    written.

    Raises:
        FormatError: a layout that is not read here, or tensors that do not fit it.
    """
    from deepseek.ops.quantized import QuantizedWeight

    return {name: QuantizedWeight.of_grid(grid.read()) for name, grid in grids_of(bundle).items()}


def words_of(grids: Mapping[str, StoredGrid]) -> str:
    """Return what is on which grid, as a person reads it: `int4 in groups of 32 (210), …`."""
    words = [
        "rotated " * grid.is_rotated
        + f"int{grid.bits} "
        + ("by rows" if grid.groups == 1 else f"in groups of {grid.group}")
        for grid in grids.values()
    ]
    return ", ".join(f"{each} ({words.count(each)})" for each in dict.fromkeys(words))
