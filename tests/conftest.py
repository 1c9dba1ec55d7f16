"""How Hypothesis tests here: a busy machine's slow example is no finding. And who runs kernels: Triton's interpreter.

Whatever else Hypothesis's own profile says stays, such as the fixed examples that it takes where CI is set.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("precis", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("precis")

# Read when triton is imported, which transformers may do. Set to 0, the kernels' tests need a GPU and run on it.
os.environ.setdefault("TRITON_INTERPRET", "1")
