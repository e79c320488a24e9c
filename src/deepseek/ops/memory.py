"""What the C library does with memory that was given back."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, for its next tensors; return whether that worked.

    glibc takes blocks of more than 32 MiB from the system one by one and gives each back when it is
    freed, so that every large tensor is cleared and faulted in anew, page by page. A step of
    training frees and takes gigabytes: a third of its time on a CPU. The process stays as large as
    it once was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, _LARGEST) and libc.mallopt(_TRIM_THRESHOLD, -1))
