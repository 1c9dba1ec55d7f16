"""Large tensors have maps of their own, and what small ones leave in the heap can go back."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Prints maps of their own: those that a tensor of 4 MiB adds, and those that are left of it.
PROGRAM = """
import ctypes, sys, torch
from app.engine.allocator import map_large_tensors
if sys.argv[1] == "mapped":
    map_large_tensors()
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
held = [torch.empty(31 * 2**18)]
held.clear()  # malloc by itself has in its heap what is smaller than the largest that was freed
before = mallinfo().hblks
held.append(torch.empty(2**20))
print(mallinfo().hblks - before)
held.clear()
print(mallinfo().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc of 2.33 or newer")
@pytest.mark.parametrize(("how", "expected"), [("mapped", [1, 0]), ("left alone", [0, 0])])
def test_a_large_tensor_has_a_map_of_its_own_that_goes_back(how: str, expected: list[int]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    printed = subprocess.check_output([sys.executable, "-c", PROGRAM, how], cwd=ROOT, env=environment, text=True)
    assert [int(line) for line in printed.split()] == expected


# Prints resident KiB: of 64 MiB of small tensors that are free again, below one that is not.
LEAVES_A_GAP = """
import sys, torch
from app.engine.allocator import give_back_unused, map_large_tensors
map_large_tensors()
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
before = resident()
held = [torch.ones(2**18) for _ in range(64)]
last = torch.ones(1000)
held.clear()
if sys.argv[1] == "given back":
    give_back_unused()
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_small_tensors_leave_in_the_heap_goes_back_only_when_asked_for() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", LEAVES_A_GAP, how], cwd=ROOT, env=environment))
        for how in ("left alone", "given back")
    )
    assert kept > 60 * 1024
    assert given_back < 20 * 1024


# Prints what malloc says of its arenas, after eight threads have each taken memory at once.
THREADS = """
import ctypes, sys, threading
from app.engine.allocator import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
together = threading.Barrier(8)
def take():
    together.wait()
    libc.malloc(100_000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")
def test_threads_share_one_heap() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    arenas = []
    for how in ("shared", "left alone"):
        printed = subprocess.check_output([sys.executable, "-c", THREADS, how], cwd=ROOT, env=environment, text=True)
        arenas.append(printed.count("<heap nr="))
    assert arenas[0] == 1
    assert arenas[1] > 1
