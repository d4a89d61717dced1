"""Which process of a DDP job this is, as far as its environment tells before Lightning starts."""

from __future__ import annotations

import logging
import os

# set by torchrun, by srun, and by Lightning for the processes that it starts itself
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def process_rank() -> int:
    """Number of this process in its DDP job; 0 also where there is no such job."""
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), 0)


def log_once() -> None:
    """Leave the log to the first process of a DDP job; errors of the others still appear."""
    if process_rank() > 0:
        logging.getLogger().setLevel(logging.ERROR)
