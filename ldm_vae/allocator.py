"""How the C library of this process hands out memory: a choice for a whole program, which the commands make."""

from __future__ import annotations

import functools

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, from malloc.h."""

KEPT_BYTES = 2**31 - 1
"""Of freed memory, at most; what `mallopt` can express."""


@functools.cache
def reuse_freed_memory() -> bool:
    """Let the C library of this process keep freed memory for the next large tensor; whether it can (glibc).

    It hands large blocks back to the kernel, which clears each page when it is touched again: for a feature map of
    100 MB that takes 5 times as long as computing it. At most `KEPT_BYTES` are kept at the end of the heap.
    """
    import ctypes  # not for every --help

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
