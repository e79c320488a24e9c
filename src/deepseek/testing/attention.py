"""What a kernel of attention must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepseek.ops.attention import DenseKV, Layout
from deepseek.ops.attention.reference import attention_reference
from deepseek.ops.choice import Attention, Case
from deepseek.ops.scheme import Storage
from deepseek.testing.proof import Trial

SHAPES = (
    (1, 1, 1, 1, 1, 8),
    (1, 4, 2, 1, 65, 16),
    (2, 6, 2, 5, 5, 24),
    (2, 3, 1, 33, 33, 64),
    (3, 4, 4, 7, 130, 80),
    (1, 2, 1, 1, 300, 128),
    (2, 6, 3, 31, 127, 32),
)
"""Batch, heads, KV heads, queries, slots, channels of a head."""
_BOUNDS: Mapping[Storage, float] = {"float32": 2e-5, "bfloat16": 2e-2, "int8": 5e-2}
"""Of values drawn from a normal distribution; queries, scores and shares may be rounded like the
keys and values."""


def prove_attention(trial: Trial, shape: tuple[int, ...], seed: int) -> tuple[float, bool]:
    """Return the largest share of the error allowed, and whether rows had the same bits apart.

    Apart is a row without the other rows, and its last query without the earlier ones.

    Args:
        trial: the kernel.
        shape: one of `SHAPES`.
        seed: of the numbers; odd ones give strided tensors.

    Raises:
        VerifyError: the kernel breaks its contract.
    """
    batch, heads, kv_heads, length, slots, dim = shape
    sizes = [batch, heads, length, dim], [batch, kv_heads, slots, dim]
    trial = trial.of(f"queries {sizes[0]}, keys {sizes[1]}")
    attend = trial.kernel.attention
    if attend is None:
        trial.fail("attention", "given, so that it can be proved", None)
    tensors = draw(shape, seed)
    queries, keys, values = (each.to(trial.case.device) for each in tensors)
    expected, bound = reference(trial.case, tensors), torch.tensor(_BOUNDS[trial.case.storage])
    whole = trial.result(attend, queries, keys, values, shape=expected.shape)
    share, kept = trial.share("output", whole, expected, bound), whole.detach().clone()
    places = (slice(-1, None), slice(None)), (slice(None), slice(-1, None))
    is_same = True
    for rows, newest in places:
        part = queries[rows, :, newest], keys[rows], values[rows]
        wanted = expected[rows, :, newest]
        alone = trial.result(attend, *part, shape=wanted.shape)
        share = max(share, trial.share("output of some rows", alone, wanted, bound))
        is_same = is_same and torch.equal(alone, kept[rows, :, newest])
    if not torch.equal(whole, kept):
        trial.fail("output", "left alone by the next call", "changed values")
    trial.of_nothing(attend, queries[:, :, :0], keys, values)
    if trial.case.has_gradients:
        share = max(share, _prove_gradients(trial, attend, tensors))
    return share, is_same


def draw(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of a shape, normal numbers on the CPU; strided with odd
    seeds."""
    batch, heads, kv_heads, length, slots, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, places: int) -> Tensor:
        found = torch.randn(batch, places, count, dim, generator=generator).transpose(1, 2)
        return found if seed % 2 else found.contiguous()

    return normal(heads, length), normal(kv_heads, slots), normal(kv_heads, slots)


def reference(case: Case, tensors: Sequence[Tensor]) -> Tensor:
    """Return what `attention_reference` says of queries, keys and values in float32."""
    queries, keys, values = tensors
    batch, length, slots = queries.shape[0], queries.shape[2], keys.shape[2]
    layout = Layout((slots - length,) * batch, (slots,) * batch, length, causal=case.is_causal)
    kv, scale = DenseKV(keys, values), queries.shape[-1] ** -0.5
    out, _ = attention_reference(queries, kv, layout, table=None, slopes=None, scale=scale)
    return out


def _prove_gradients(trial: Trial, attend: Attention, tensors: Sequence[Tensor]) -> float:
    """Return the largest share of the error allowed, of the gradients of queries, keys, values."""
    ours = [each.detach().to(trial.case.device).requires_grad_() for each in tensors]
    theirs = [each.detach().requires_grad_() for each in tensors]
    expected, found = reference(trial.case, theirs), trial.call(attend, *ours)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(expected, theirs, direction)
    made = trial.gradients(found, ours, direction)
    bound = torch.tensor(_BOUNDS[trial.case.storage])
    named = zip(("queries", "keys", "values"), made, wanted, strict=True)
    return max(
        trial.share(f"gradient of {name}", one, other, bound * other.abs().amax().clamp_min(1))
        for name, one, other in named
    )
