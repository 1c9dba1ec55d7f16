"""What an engine spends its time on, on a CPU with rows in fp32, in C: products, attention, the choice of tokens.

The C files say how, and why that is faster than a library's; `python -m benchmarks.kernels` prints by how much. gcc
compiles them when the package is installed. Of a step's attention and choice it has what `app.engine.triton_kernels`
has; products and attention serve an encoder as well. What does not fit is refused with a ValueError before memory is
read. Does not know networks or requests, nor where it is faster: see `app/engine/kernels.py`.
"""

from app.engine.cpu_kernels.attention import cross_attention, fits, self_attention, source_attention
from app.engine.cpu_kernels.choice import ban_ngrams, can_choose, keep, log_softmax, top_candidates
from app.engine.cpu_kernels.compiled import MissingKernelsError
from app.engine.cpu_kernels.draws import can_draw, draw, perturb, raise_floors
from app.engine.cpu_kernels.products import multiply, multiply_int8, pack, pack_int8

__all__ = [
    "MissingKernelsError",
    "ban_ngrams",
    "can_choose",
    "can_draw",
    "cross_attention",
    "draw",
    "fits",
    "keep",
    "log_softmax",
    "multiply",
    "multiply_int8",
    "pack",
    "pack_int8",
    "perturb",
    "raise_floors",
    "self_attention",
    "source_attention",
    "top_candidates",
]
