"""Tasks of a SLURM job that are meant as processors, or as processes of a DDP job."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from prts.errors import ParameterError


def own_processes(trainer: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that keep Lightning's Trainer from taking the tasks of a SLURM job for its own processes.

    `#SBATCH --ntasks=8` is often meant as eight processors: without `srun` there is one process. It trains on the devices that it is told
    to, and starts the other processes of DDP itself.

    Parameters
    ----------
    trainer
        What makes the Trainer, a partial with its arguments.

    Raises
    ------
    ParameterError
        If `srun` started several tasks, but the Trainer has one device: each would train the same.
    """
    tasks = _number("SLURM_NTASKS")
    given = getattr(trainer, "keywords", {})
    if tasks < 2 or given.get("plugins"):
        return {}
    if _number("SLURM_STEP_NUM_TASKS") < 2 and os.environ.get("SLURM_PROCID", "0") == "0":
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment

        return {"plugins": [LightningEnvironment()]}
    if given.get("devices") == 1 and given.get("num_nodes", 1) == 1:
        raise ParameterError(
            "trainer",
            "devices",
            f"1, but srun started {tasks} tasks that would all train the same; use srun --ntasks=1 --cpus-per-task={tasks}, or trainer=ddp "
            "with a task for each GPU (--ntasks-per-node)",
        )
    return {}


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 1
