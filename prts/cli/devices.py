"""One job a GPU: jobs that a launcher runs side by side on one machine take turns, instead of filling the memory of the first one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

logger = logging.getLogger(__name__)

_POLL_S = 1.0


@contextmanager
def own_gpu(config: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Wait for a GPU that no other job has, and yield the environment variable that shows the job only this one.

    Nothing is set without GPUs, for jobs that use the CPU or several devices, and under SLURM, which divides the GPUs itself.

    Parameters
    ----------
    config
        The job's config.
    """
    gpus = _gpus() if _wants_one(config) and "SLURM_JOB_ID" not in os.environ else []
    if not gpus:
        yield {}
        return
    locks = {gpu: filelock.FileLock(_lock_file(gpu)) for gpu in gpus}
    gpu = _first_free(locks)
    try:
        logger.info("on GPU %s", gpu)
        yield {"CUDA_VISIBLE_DEVICES": gpu}
    finally:
        locks[gpu].release()


def _wants_one(config: Mapping[str, Any]) -> bool:
    trainer, encoder = config.get("trainer") or {}, config.get("encoder") or {}
    trains = trainer.get("accelerator", "cpu") in ("auto", "gpu", "cuda")
    encodes = str(encoder.get("device", "cpu")) in ("auto", "cuda")
    return (trains or encodes) and trainer.get("devices", 1) in (1, "1", "auto")


def _gpus() -> list[str]:
    if not any(map(shutil.which, ("nvidia-smi", "rocm-smi"))):
        return []
    import torch  # slow to import

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    n = torch.cuda.device_count()
    return [str(i) for i in range(n)] if visible is None else [each.strip() for each in visible.split(",")][:n]


def _lock_file(gpu: str) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"prts-gpu-{user}-{gpu.replace('/', '-')}.lock"


def _first_free(locks: Mapping[str, filelock.FileLock]) -> str:
    told = False
    while True:
        for gpu, lock in locks.items():
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                continue
            return gpu
        if not told:
            logger.info("waiting for a GPU: each of %d has a job", len(locks))
            told = True
        time.sleep(_POLL_S)
