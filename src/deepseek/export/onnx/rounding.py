"""Weights of no grid, rounded to one for the file: int8 by rows, int4 in groups of 32.

Calibration, rotation and learned rounding are what `deepseek compress` is for; a bundle that it
made keeps the codes it has.
"""

from __future__ import annotations

import numpy as np

from deepseek.ops.grid import OFFSET, Bytes, Floats, Grid

GROUP = 32
_ROWS = 64
"""Rounded at a time, so that what is compared stays in the processor's cache."""
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


def int8_rows(weight: Floats) -> Grid:
    """Return a weight [N, K] on a symmetric grid of 8 bits with a scale for each row, a float16
    number."""
    most = np.abs(weight).max(1, keepdims=True)
    scale = (most / 127).astype(np.float16).astype(np.float32)
    levels = _divided(weight, scale).round().clip(-127, 127)
    zero = np.full(scale.shape, OFFSET[8], np.uint8)
    return Grid(8, (levels + OFFSET[8]).astype(np.uint8), scale, zero)


def int4_groups(weight: Floats) -> Grid:
    """Return a weight [N, K] on a grid of 4 bits with a scale, a float16 number, and a zero point
    for each 32 channels: of the range, the group's own or narrowed by up to 20 %, with the least
    squared error."""
    parts = [_int4_rows(weight[start : start + _ROWS]) for start in range(0, len(weight), _ROWS)]
    codes, scale, zero = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Grid(4, codes, scale, zero)


def _int4_rows(weight: Floats) -> tuple[Bytes, Floats, Bytes]:
    """Return codes [N, K], scales and zero points [N, groups]."""
    blocks = weight.reshape(len(weight), -1, GROUP)
    low = np.minimum(blocks.min(-1, keepdims=True), 0)
    high = np.maximum(blocks.max(-1, keepdims=True), 0)
    codes = np.zeros(blocks.shape, np.uint8)
    best_scale, best_zero = np.zeros_like(low), np.zeros(low.shape, np.uint8)
    best_error = np.full(low.shape, np.inf, np.float32)
    for shrink in _SHRINKS:
        scale = ((high - low) * np.float32(shrink / 15)).astype(np.float16).astype(np.float32)
        zero = _divided(-low * np.float32(shrink), scale).round().clip(0, 15)
        found = (_divided(blocks, scale) + zero).round().clip(0, 15)
        error = np.square((found - zero) * scale - blocks).sum(-1, keepdims=True)
        is_better = error < best_error
        np.copyto(codes, found.astype(np.uint8), where=is_better)
        np.copyto(best_scale, scale, where=is_better)
        np.copyto(best_zero, zero.astype(np.uint8), where=is_better)
        np.copyto(best_error, error, where=is_better)
    return codes.reshape(weight.shape), best_scale[..., 0], best_zero[..., 0]


def _divided(values: Floats, scale: Floats) -> Floats:
    return np.divide(values, scale, out=np.zeros_like(values * scale), where=scale > 0)
