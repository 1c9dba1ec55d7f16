"""Random numbers that are a function of a counter and a key, and of nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in int64 tensor arithmetic. A
sequence's draws depend on its seed, its row and its step: not on the batch, the slot or the device. Does not know what
the numbers are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Four random words for each counter.

    Args:
        counter: [..., 4] int64, words of 32 bits.
        key: [..., 2] int64, words of 32 bits; broadcast against the counters.

    Returns:
        [..., 4] int64, each in [0, 2 ** 32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps into int64's sign: its 64 bits are right all the same.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW, (k1 + _KEY_INCREMENTS[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], -1)


def gumbel_noise(seeds: Tensor, steps: Tensor, rows: int, width: int, together: int | None = None) -> Tensor:
    """Standard Gumbel noise: `argmax(scores + noise)` draws from softmax(scores).

    The k best are k draws without replacement, in order (Kool et al. 2019, arXiv:1903.06059).

    Args:
        seeds: [S, 2] int64, low and high 32 bits.
        steps: [S] int64.
        rows: K, rows of a sequence.
        width: V, a multiple of 4.
        together: slots whose numbers of 64 bits, which are many, are held at once; None is one on a CPU, and some 64
            rows where each launch costs: tensors of 16 MB each with 30,000 columns.

    Returns:
        [S, K, V] fp32, a function of (seed, step, row, column) and, in its last bits, of who takes the logarithm: torch
        on a device, or kernels in C. Uniform words keep 23 of their bits, so that neither 0 nor 1 is drawn: events
        rarer than 2 ** -24 have the wrong odds.
    """
    size, device = seeds.shape[0], seeds.device
    together = together or (1 if device.type == "cpu" else max(1, 64 // rows))
    noise = torch.empty(size, rows, width, device=device)
    for first in range(0, size, together):
        slots = slice(first, first + together)
        counter = torch.zeros(len(steps[slots]), rows, width // 4, 4, dtype=torch.int64, device=device)
        counter[..., 0] = torch.arange(width // 4, device=device)
        counter[..., 1] = torch.arange(rows, device=device)[:, None]
        counter[..., 2] = steps[slots, None, None]
        words = philox4x32(counter, seeds[slots, None, None])  # [together, K, V / 4, 4]
        uniform = ((words >> 9).float() + 0.5) * 2.0**-23
        noise[slots] = -torch.log(-torch.log(uniform)).flatten(2)
    return noise
