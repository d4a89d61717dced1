"""What became of the jobs of a multirun, read from their folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prts.errors import InputError

OBJECTIVE = "val/pcc_mean"  # what a sweep maximises; never a figure of the test sections
FIXED = ("job", "status", "reason", "tissue", "seed")


def read_jobs(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """One row a job: what was overridden, what became of it, and its metrics.

    Parameters
    ----------
    folder
        Of a multirun; each job's folder in it holds `.hydra/`, and metrics.json or error.txt.

    Returns
    -------
    The table, with columns `job, status, reason, tissue, seed`, the overrides (by their key) and the metrics, in the order of the job
    numbers; and the keys of the overrides, without tissue and seed. `status` is done, wrong input, failed, killed or unfinished;
    `reason` is one line.

    Raises
    ------
    InputError
        If there is no job in the folder.
    """
    rows, keys, metrics = [], dict[str, None](), set[str]()
    for overrides_yaml in Path(folder).rglob(".hydra/overrides.yaml"):
        job = overrides_yaml.parents[1]
        overrides = _overrides(overrides_yaml)
        config = yaml.safe_load((job / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
        number = yaml.safe_load((job / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]["job"]["num"]
        status, reason = _outcome(job)
        figures: dict[str, Any] = {}
        if status == "done":
            figures = json.loads((job / "metrics.json").read_text(encoding="utf-8"))
        row = {"job": job.relative_to(folder).as_posix(), "status": status, "reason": reason}
        row |= {"tissue": config["tissue"]["name"], "seed": config["seed"]}
        keys |= dict.fromkeys(overrides)
        metrics |= figures.keys()
        rows.append((int(number), row | overrides | figures))
    if not rows:
        raise InputError(f"{folder}: holds no job of a multirun (folders with .hydra/overrides.yaml)")
    rows.sort(key=lambda numbered: numbered[0])
    own = [key for key in keys if key not in FIXED]
    table = pd.DataFrame([row for _, row in rows], columns=[*FIXED, *own, *sorted(metrics)])
    return table, own


def _overrides(path: Path) -> dict[str, str]:
    parts = [str(line).partition("=") for line in yaml.safe_load(path.read_text(encoding="utf-8")) or []]
    return {key.lstrip("+~"): value for key, _, value in parts if key.lstrip("+~") not in ("tissue", "seed")}


def _outcome(job: Path) -> tuple[str, str]:
    if (job / "error.txt").is_file():  # first: a job may fail when its metrics are written, in a logger
        first = (job / "error.txt").read_text(encoding="utf-8").partition("\n")[0]
        if match := re.fullmatch(r"(wrong input|failed|killed): (.*)", first):
            return match[1], match[2]
        return "failed", first
    if (job / "metrics.json").is_file():
        return "done", ""
    return "unfinished", "stopped before it ended"
