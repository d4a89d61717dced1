"""The cores that a worker was given, and threads that stay within them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# What SLURM gave the job, and what joblib's launcher, or the user, allows a process.
_VARIABLES = ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS")


def cores_given() -> int:
    """The cores that this process may use: of its affinity, those of the job, and `OMP_NUM_THREADS`, the fewest."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [int(value) for name in _VARIABLES if (value := os.environ.get(name, "")).isdigit() and int(value) > 0]
    return min([bound, *counts])


@contextmanager
def within_cores(cores: int) -> Iterator[None]:
    """Keep torch, and TensorFlow if it is not loaded yet, from starting more threads than there are cores."""
    import torch

    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, str(cores))
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, cores))
    try:
        yield
    finally:
        torch.set_num_threads(before)
