"""One attention from several over disjoint keys: what a text that is spread over devices needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.errors import ShapeError, describe
from deepseek.ops.hardware import wide_of


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return attention over the union of keys of which each part saw some, as one softmax over all
    of them gives it, and its log-sum-exp; with gradients.

    Args:
        parts: what `attention(..., return_lse=True)` returns of the same queries: outputs [B,
            heads, T, dim] and log-sum-exp [B, heads, T]. No key may be in two of them, and no
            table of theirs may have means, which stand for the keys of the other parts.

    Raises:
        ShapeError: no parts, or parts of different shapes.

    Source: Milakov, Gimelshein 2018, "Online normalizer calculation for softmax" (1805.02867),
    section 3.1; for attention Dao et al. 2022 (2205.14135), section 3.1.
    """
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in parts}
    if len(shapes) != 1:
        must = "at least one, all of the same shapes"
        raise ShapeError(describe("parts", "merge", must, sorted(shapes)))
    outs, lses = zip(*parts, strict=True)
    sums = torch.stack(lses)
    # finite, so that a query that sees nothing anywhere has no NaN
    top = sums.detach().amax(0).nan_to_num(neginf=0.0)
    shares = (sums - top).exp()
    total = shares.sum(0)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    shares = (shares / total)[..., None]
    out = (shares * torch.stack(outs).to(wide_of(sums))).sum(0).to(outs[0].dtype)
    return out, (top + total.log()).masked_fill(blind, float("-inf"))
