"""What this processor computes natively, and the switch for a library that gets in the way."""

from __future__ import annotations

import contextlib
import functools
import platform
import threading
from collections.abc import Iterator
from typing import Literal

import torch


@functools.cache
def _cpu_computes_bf16() -> bool:
    if platform.machine() in ("x86_64", "AMD64"):
        # AVX-512 alone is not enough: Skylake and Cascade Lake have it without bfloat16 products
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def computes_bf16(device: torch.device) -> bool:
    """Return whether matrix products in bfloat16 have hardware support on the device.

    A CPU without AVX-512 BF16 or AMX multiplies bfloat16 matrices several times slower than
    float32 ones.
    """
    return device.type != "cpu" or _cpu_computes_bf16()


def products_in(precision: Literal["float32", "bfloat16"]) -> torch.dtype:
    """Return in which dtype this processor multiplies when a precision is asked for: float32 for
    bfloat16 where it has no instructions for that, which is more exact and several times as
    fast."""
    has_bf16 = computes_bf16(torch.device("cpu"))
    return torch.bfloat16 if precision == "bfloat16" and has_bf16 else torch.float32


def computed_in(states: torch.Tensor) -> torch.dtype:
    """Return the dtype in which products of the states are computed: that of autocast, where it is
    on."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def wide_of(states: torch.Tensor) -> torch.dtype:
    """Return the dtype in which sums of the states are kept: float32, or float64 for float64."""
    return torch.promote_types(states.dtype, torch.float32)


class _OneDnnSwitch:
    """Counts who wants oneDNN off: one flag per process, its users may be several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    torch.backends.mkldnn.enabled = self._before


_ONEDNN = _OneDnnSwitch()


def without_onednn() -> contextlib.AbstractContextManager[None]:
    """Return a context in which PyTorch's own CPU kernels run in place of oneDNN's."""
    return _ONEDNN.off()
