"""The cores that a process was given, and threads that stay within them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

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


def in_threads(work: Callable[[Given], Made], items: Iterable[Given], threads: int) -> Iterator[Made]:
    """Results of `work`, which releases the GIL, in the order of the items, of which few are at hand at a time.

    Parameters
    ----------
    work
        Runs in the threads.
    items
        Taken in the thread of the caller, one more than there are threads.
    threads
        Number of threads.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Made]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
