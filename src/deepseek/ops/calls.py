"""What our kernels are called by: tensors in, tensors out. `choice` names them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deepseek.ops.attention import DenseKV, Layout, attention
from deepseek.ops.choice import Product
from deepseek.ops.cpu.single import PackedLinear, paged_attention
from deepseek.ops.linear import linear
from deepseek.ops.scheme import KVStorage, Storage


def compiled_linear(
    weight: Tensor, bias: Tensor | None, *, storage: Storage, group: int | None, isa: str
) -> Product:
    """Pack a weight for the compiled kernels and return the product with it.

    Args:
        weight: float32 [N, K] on the CPU.
        bias: float32 [N] or None.
        storage, group, isa: as in `PackedLinear`.

    Raises:
        ShapeError: weight, bias and later inputs do not fit one another.
    """
    held = None if bias is None else _array(bias)
    product = PackedLinear(_array(weight), held, storage=storage, group=group, isa=isa)
    return lambda inputs: torch.from_numpy(product(_array(inputs)))


def compiled_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, storage: KVStorage, isa: str
) -> Tensor:
    """Return causal attention by the compiled kernels, as `paged_attention` says.

    Raises:
        ShapeError: queries, keys and values do not fit one another.
    """
    arrays = (_array(each) for each in (queries, keys, values))
    return torch.from_numpy(paged_attention(*arrays, storage=storage, isa=isa))


def torch_linear(weight: Tensor, bias: Tensor | None, *, storage: Storage) -> Product:
    """Return the product with a weight in PyTorch, with gradients.

    Args:
        weight: float32 [N, K].
        bias: float32 [N] or None.
        storage: float32, or bfloat16, in which the output is rounded too, before the bias.
    """
    if storage == "float32":
        return lambda inputs: linear(inputs, weight, bias)
    narrow = weight.bfloat16()

    def product(inputs: Tensor) -> Tensor:
        found = linear(inputs.bfloat16(), narrow).float()
        return found if bias is None else found + bias

    return product


def torch_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, storage: Storage, is_causal: bool
) -> Tensor:
    """Return attention of the last T of S slots in PyTorch, with gradients: [B, heads, T, dim].

    Args:
        queries: float32 [B, heads, T, dim].
        keys, values: float32 [B, KV heads, S, dim].
        storage: float32 or bfloat16.
        is_causal: a query sees its own slot and earlier ones only.
    """
    dtype = torch.float32 if storage == "float32" else torch.bfloat16
    batch, length, slots = queries.shape[0], queries.shape[2], keys.shape[2]
    layout = Layout((slots - length,) * batch, (slots,) * batch, length, causal=is_causal)
    kv = DenseKV(keys.to(dtype), values.to(dtype))
    return attention(queries.to(dtype), kv, layout).float()


def _array(values: Tensor) -> np.ndarray:
    return values.detach().numpy()
