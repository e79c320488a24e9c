"""Quantization-aware training on grids of integers."""

from __future__ import annotations

from deepseek.compress.qat.fake import fake_quantize, quantize_on
from deepseek.compress.qat.grid import Grid, fitted
from deepseek.compress.qat.stage import QuantizeAware, quantize_aware

__all__ = ["Grid", "QuantizeAware", "fake_quantize", "fitted", "quantize_aware", "quantize_on"]
