"""The reader of a graph that `traced` made, whatever runtime runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek.export.formats import Kind
from deepseek.export.graph_reader import GraphReader


def traced_reader(
    run: Callable[..., Sequence[Tensor]],
    *,
    name: str,
    kind: Kind,
    max_tokens: int,
    max_batch: int,
    past: Sequence[Sequence[int]],
) -> GraphReader:
    """Return the reader of a graph with the inputs of `TracedDecoder` or `TracedEncoder`.

    Args:
        run: computes the outputs.
        name: of the runtime.
        kind: of the model.
        max_tokens: longest text.
        max_batch: most rows.
        past: of a decoder, shapes of keys and values, of any batch and length; else empty.
    """

    def empty(rows: int) -> list[np.ndarray]:
        return [
            np.zeros((layers, rows, heads, 0, dim), np.float32) for layers, _, heads, _, dim in past
        ]

    def call(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        ids, mask, *kept = map(_tensor, inputs)
        if not kept:
            return [each.numpy() for each in run(ids, mask)]
        num_past = kept[0].shape[3]
        masks = _plain(mask[:, num_past:]), _plain(mask[:, :num_past])
        logits, *fresh = run(ids, *masks, *kept)
        whole = (torch.cat(pair, 3) for pair in zip(kept, fresh, strict=True))
        return [logits.numpy(), *(each.numpy() for each in whole)]

    return GraphReader(
        name=name,
        kind=kind,
        max_tokens=max_tokens,
        max_batch=max_batch,
        run=call,
        empty=empty if past else None,
    )


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor with its numbers side by side, as compiled graphs want it."""
    return _plain(torch.from_numpy(array if array.flags.writeable else array.copy()))


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor with its numbers side by side; of an empty one, with the strides that it
    would have then, which ExecuTorch wants and `contiguous` does not give."""
    return tensor.contiguous() if tensor.numel() else tensor.new_zeros(tensor.shape)
