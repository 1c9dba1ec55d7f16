"""A decode step's small operations as few kernels, for NVIDIA GPUs: attention, norms, products of few rows, the choice.

A step of few sequences is bound by how many kernels it is, not by what they do; one of many, by what they read twice.
Each function here does what torch's operations elsewhere do, up to rounding: sums are in fp32 whatever the dtype, and
products of fp32 are true ones. Imported only where they are to be used (`app/engine/kernels.py`). Knows shapes and
strides; does not know networks or requests.
"""

from app.engine.triton_kernels.choice import ban_ngrams, can_choose, can_draw, keep, log_softmax, top_candidates
from app.engine.triton_kernels.network import add_norm, cross_attention, fits, self_attention
from app.engine.triton_kernels.products import MAX_ROWS, linear, linear_in_parts, takes

__all__ = [
    "MAX_ROWS",
    "add_norm",
    "ban_ngrams",
    "can_choose",
    "can_draw",
    "cross_attention",
    "fits",
    "keep",
    "linear",
    "linear_in_parts",
    "log_softmax",
    "self_attention",
    "takes",
    "top_candidates",
]
