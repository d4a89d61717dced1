"""What the machine can do: the rates that limits are worked out from."""

from __future__ import annotations

import time


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads, the best of five copies of half a gigabyte (it writes as many)."""
    import numpy as np

    source = np.ones(1 << 26)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return source.nbytes / best


def matmul_rate(dtype: str, shape: tuple[int, int, int] = (4096, 4096, 4096), seconds: float = 2.0) -> float:
    """FLOP a second of torch's product of (m, k) and (k, n) matrices, the best over some time."""
    import torch

    m, k, n = shape
    a, b = (torch.randn(size, dtype=getattr(torch, dtype)) for size in ((m, k), (k, n)))
    out = torch.empty((m, n), dtype=a.dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * m * k * n / best
