"""Memory of a CPU's process: large tensors have maps of their own, in large pages; what small ones leave can go back.

Steps and batches have tensors of ever other sizes. In malloc's heap they would leave gaps between small blocks that
live longer, among them the code that oneDNN compiles and keeps for each shape: the heap of a server grew by hundreds of
MiB that nobody used. A map of its own goes back as a whole. Small tensors stay in the heap, which is as large as the
most that there ever was in it at once, and each new most would stay for good. All threads share that heap: one of its
own for each would keep the most of each. Knows glibc and torch's allocator, not who asks for memory, nor when.
"""

from __future__ import annotations

import ctypes
import os

# From this size on torch asks for large pages, which are of this size.
LARGE = 2 * 2**20
# malloc keeps what is free at the end of its heap up to here: small tensors come and go in every step.
KEPT = 256 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def map_large_tensors() -> None:
    """Tensors of `LARGE` bytes and more get maps of their own from now on, in pages of 2 MiB.

    Reading weights then also waits for fewer translations of addresses (`python -m benchmarks.huge_pages`). What
    somebody says otherwise in THP_MEM_ALLOC_ENABLE or MALLOC_MMAP_THRESHOLD_ stands; without glibc nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch first takes memory
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


def share_one_heap() -> None:
    """Threads that begin from now on take memory from the heap that there is.

    A thread that is given an arena fills it with what it has in hand at once, such as the tokens of the longest batch,
    and keeps that after it is free: `malloc_trim` gives back whole pages, and blocks that live longer lie between. What
    somebody says otherwise in MALLOC_ARENA_MAX stands; without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if "MALLOC_ARENA_MAX" not in os.environ and mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back_unused() -> None:
    """Pages of malloc's heaps that nobody uses go back to the system; without glibc nothing happens."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
