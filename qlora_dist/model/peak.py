"""What a device multiplies at best: what model FLOPs utilization (MFU) is measured against."""

from __future__ import annotations

import time
from functools import cache

import torch

from qlora_dist.runtime.processes import Runtime

_BUDGET_SECONDS = 0.1


def peak_flops(runtime: Runtime) -> float:
    """Floating-point operations per second of all ranks together, measured by all at once; a collective."""
    runtime.barrier()
    mine = torch.tensor(matmul_flops(runtime.device, runtime.compute_dtype), device=runtime.device)
    return runtime.sum_over_ranks(mine).item()


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product, with the process's threads.

    The quickest of at least five within 0.1 s: on a machine that others use as well, the median would be their mood.
    """
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _BUDGET_SECONDS:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
