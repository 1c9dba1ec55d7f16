"""What a machine can do: bytes read a second, and multiplications a second. Does not know what is held against it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from app.engine.linear import choose_linear, rows_dtype
from benchmarks.report import significant


def measure_bandwidth(device: str, gib: float) -> dict[str, float]:
    """Bytes a second: a large tensor read (the best way of three), copied (read + written), and 256 MiB read again."""
    large = torch.ones(round(gib * 2**28), device=device)
    side = 2 ** ((large.numel().bit_length() - 1) // 2)
    matrix, vector = large[: side * side].view(side, side), torch.ones(side, device=device)
    target = torch.empty_like(large)
    small = torch.ones(min(2**26, large.numel()), device=device)
    measured = {
        "read": max(
            large.nbytes / fastest(device, large.sum),
            large.nbytes / fastest(device, lambda: torch.dot(large, large)),
            matrix.nbytes / fastest(device, lambda: torch.mv(matrix, vector)),
        ),
        "copy": 2 * large.nbytes / fastest(device, lambda: target.copy_(large)),
        "cached": small.nbytes / fastest(device, small.sum),
    }
    return {name: significant(value) for name, value in measured.items()}


def rows_in(device: str, dtype: str) -> torch.dtype:
    """What the engine's rows are in between products: in bfloat16 a CPU that is slow in it keeps them in fp32."""
    int8 = dtype == "int8"
    return rows_dtype(torch.device(device), torch.float32 if int8 else getattr(torch, dtype), int8)


@torch.inference_mode()
def measure_rate(device: str, dtype: str, saved: str = "float32") -> float:
    """Multiplications a second of one product of 2,048 rows, in the form that the engine gives to an encoder.

    `saved`: the dtype of the file that its weights come from.
    """
    int8, place, real = dtype == "int8", torch.device(device), rows_in(device, dtype)
    kept = torch.float32 if int8 else getattr(torch, dtype)
    weight, bias = (
        torch.randn(3072, 1024).to(getattr(torch, saved)).to(device, real),
        torch.zeros(3072, device=device, dtype=real),
    )
    linear = choose_linear(place, kept, int8, few_rows=False, rows=real)(weight, bias)
    rows = torch.randn(2048, 1024).to(device, real)
    return 2048 * weight.numel() / fastest(device, lambda: linear(rows))


def fastest(device: str, work: Callable[[], object], times: int = 7) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
