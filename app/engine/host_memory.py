"""Memory that a CPU's operations free stays with the process for those that follow.

A decode step's logits alone are megabytes. glibc gives such blocks back to the system when they are freed, and takes a
page fault for each 4 KiB when the next step has them again: 5 to 10 % of the shipped model's time. Does not know
tensors; an allocator in glibc's place (jemalloc, tcmalloc) does as it likes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform

logger = logging.getLogger(__name__)

# Of malloc.h: from how many bytes on a block is the system's own, not the heap's (glibc takes no greater threshold);
# how much of the heap's end must be idle before it is given back; how much stays idle then, of a thread's heaps too.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_OF_THE_HEAP = 32 * 2**20
# Some steps' and encoder batches' worth.
_KEPT = 256 * 2**20
# Whoever sets one has decided already.
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the whole process; whether it does. Not where the environment says how."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_M_MMAP_THRESHOLD, _LARGEST_OF_THE_HEAP), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _KEPT))
    kept = all(mallopt(parameter, value) for parameter, value in wanted)
    if not kept:
        logger.warning("glibc refuses to keep freed memory: operations on a CPU take page faults")
    return kept
