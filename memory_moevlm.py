# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The C library's memory, kept from step to step and given back: on Linux with glibc; elsewhere this does nothing."""

import ctypes
from contextlib import suppress

# Option numbers of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MISSING = (AttributeError, OSError, TypeError)


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next training step; whether it could.

    glibc returns blocks above 32 MB to the system at once, such as the gradients of stacked experts, and each step pays
    for their pages anew: about a fifth of a step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except MISSING:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def release_freed_memory() -> None:
    """Give back what [`keep_freed_memory`] kept: what comes next may need all of the machine's."""
    with suppress(*MISSING):
        ctypes.CDLL(None).malloc_trim(0)
