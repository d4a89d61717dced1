"""The outcome of each job of a multirun, read from their folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prts.errors import InputError

OBJECTIVE = "val/pcc_mean"  # what a sweep maximizes; never a score of the test sections
# what the job of a command writes last
RESULTS = {"train": "metrics.json", "prepare": "prepared.json"}
FIXED = ("job", "status", "reason", "tissue", "seed")


def read_jobs(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read the overrides, outcome and metrics of each job.

    Parameters
    ----------
    folder
        Folder of a multirun. Each job has a folder in it with `.hydra/`, and metrics.json or error.txt.

    Returns
    -------
    A table with one row per job, in the order of the job numbers, and the keys of the overrides without tissue and seed. Columns are
    `job, status, reason, tissue, seed`, the overrides by key, and the metrics. `status` is done, wrong input, failed, killed or
    unfinished; `reason` is one line.

    Raises
    ------
    InputError
        If the folder has no jobs.
    """
    rows, keys, metrics = [], dict[str, None](), set[str]()
    for job in job_folders(folder):
        overrides = _overrides(job / ".hydra" / "overrides.yaml")
        config = yaml.safe_load((job / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
        number = yaml.safe_load((job / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]["job"]["num"]
        status, reason = outcome(job)
        figures: dict[str, Any] = {}
        if status == "done":
            figures = json.loads((job / "metrics.json").read_text(encoding="utf-8"))
        row = {"job": job.relative_to(folder).as_posix(), "status": status, "reason": reason}
        row |= {"tissue": config["tissue"]["name"], "seed": config["seed"]}
        keys |= dict.fromkeys(overrides)
        metrics |= figures.keys()
        rows.append((int(number), row | overrides | figures))
    if not rows:
        raise InputError(
            f"{folder}: has no jobs of a multirun (folders with .hydra/overrides.yaml); give the folder of a multirun"
        )
    rows.sort(key=lambda numbered: numbered[0])
    own = [key for key in keys if key not in FIXED]
    table = pd.DataFrame([row for _, row in rows], columns=[*FIXED, *own, *sorted(metrics)])
    return table, own


def job_folders(folder: Path) -> list[Path]:
    """The folders of the jobs that a multirun has started."""
    return [path.parents[1] for path in Path(folder).rglob(".hydra/overrides.yaml")]


def _overrides(path: Path) -> dict[str, str]:
    parts = [str(line).partition("=") for line in yaml.safe_load(path.read_text(encoding="utf-8")) or []]
    return {key.lstrip("+~"): value for key, _, value in parts if key.lstrip("+~") not in ("tissue", "seed")}


def outcome(job: Path) -> tuple[str, str]:
    """The status of a job, as in `read_jobs`, and the reason in one line."""
    if (job / "error.txt").is_file():  # first: a logger may fail after metrics.json is written
        first = (job / "error.txt").read_text(encoding="utf-8").partition("\n")[0]
        if match := re.fullmatch(r"(wrong input|failed|killed): (.*)", first):
            return match[1], match[2]
        return "failed", first
    if any((job / result).is_file() for result in RESULTS.values()):
        return "done", ""
    return "unfinished", "stopped before the end"
