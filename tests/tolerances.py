"""How far a result may lie from its reference, by dtype. One table for every test."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """A result passes when `|actual - expected| <= atol + rtol * |expected|`."""

    rtol: float
    atol: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-9, atol=1e-10),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.float16: Tolerance(rtol=2e-3, atol=2e-3),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1.6e-2),
}

MODEL_LOGITS_ATOL = 1e-4
"""Logits of a whole float32 model against the reference implementation: the largest difference."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless `actual` equals `expected` as closely as `dtype` allows.

    Args:
        actual: the result, of any shape.
        expected: the reference, of the same shape.
        dtype: the coarsest dtype that took part in computing `actual`; its own when None.
    """
    allowed = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=allowed.rtol, atol=allowed.atol
    )


def assert_logits_equal(actual: Tensor, expected: Tensor) -> None:
    """Fail unless float32 logits agree within `MODEL_LOGITS_ATOL`, with no share relative."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=MODEL_LOGITS_ATOL)
