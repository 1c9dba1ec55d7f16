"""How tests run on a busy machine, and who runs kernels.

Hypothesis: a slow example is no finding. Whatever else its own profile says stays, such as the fixed examples that it
takes where CI is set. Torch: one thread in each of several processes of pytest-xdist, which else wait for one another.
Triton: its interpreter, on the CPU.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Read by torch when it is imported, here and in what a test starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("precis", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("precis")

# Read when triton is imported, which transformers may do. Set to 0, the kernels' tests need a GPU and run on it.
os.environ.setdefault("TRITON_INTERPRET", "1")
