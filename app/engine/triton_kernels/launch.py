"""Where kernels are launched, and whether one may begin while the one before it ends.

With programmatic dependent launch (compute capability 9) a kernel's programs start as soon as those of the kernel
before it have passed `begin`, fetch weights, and wait there until that kernel has ended. What a kernel reads before
`begin` must be constant for the whole step, and it writes nothing there. Since `begin` waits first and lets the next
start afterwards, whatever ran two kernels earlier has ended, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Off for comparison alone (`python -m benchmarks.gpu_kernels`).
overlapping = True


def on(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device; on a CPU (its interpreter) nothing changes."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]  # torch gives it no types


def overlap(tensor: Tensor) -> dict[str, bool]:
    """Keyword arguments for the launch of a kernel that calls `begin(PDL)`."""
    if overlapping and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def begin(PDL: tl.constexpr):
    """From here on a kernel may read what kernels before it write, and write itself."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
