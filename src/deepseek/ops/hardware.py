"""What this processor computes natively, asked once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def _cpu_computes_bf16() -> bool:
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2") and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def computes_bf16(device: torch.device) -> bool:
    """Return whether matrix products in bfloat16 have hardware support on the device.

    A CPU without AVX-512 BF16 or AMX multiplies bfloat16 matrices several times slower than float32 ones.
    """
    return device.type != "cpu" or _cpu_computes_bf16()
