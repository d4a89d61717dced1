"""Validation PCC of several settings of `prts train`, without their baselines, test and run folder.

usage: python -m benchmarks.validation "tissue=kidney experiment=bins" "" "model.net.rank=null" "model.net.rank=32 seed=2"

The first argument is common to all tries; each other one is a try, "" for the common settings as they are. Prints a row of a table for
each: mean per-gene PCC of the kept epoch on validation, and seconds of training. Tries with the same input share the loaded data.
"""

from __future__ import annotations

import logging
import sys
import time

from prts.api.training_plan import TrainingPlan
from prts.cli.check import check_config
from prts.cli.train import training_plan
from prts.data.datamodule import PRTSDataModule
from prts.models.fit import fit
from prts.models.module import KeepBest, seed_everything
from prts.stopwatch import Stopwatch


def validation_pcc(plan: TrainingPlan, data: PRTSDataModule) -> tuple[float, int | None]:
    """PCC of the kept epoch, and its number."""
    seed_everything(plan.recipe.seed)
    data.batch_size, data.seed = plan.data.batch_size, plan.recipe.seed
    fit(plan.recipe, data)
    (kept,) = (callback for callback in plan.recipe.callbacks if isinstance(callback, KeepBest))
    return kept.best_value, kept.best_epoch


def main(common: str, tries: list[str]) -> None:
    """Print the table."""
    data, loaded = None, None
    print("| settings | validation PCC | epoch | s |\n|---|---|---|---|", flush=True)
    for given in tries:
        cfg = check_config("train", [*common.split(), *given.split()])
        plan = training_plan(cfg)
        wanted = [cfg[key] for key in ("tissue", "encoder", "panel", "qc", "split", "preprocess", "units", "bin_um")]
        wanted += [plan.data.use, plan.data.scale]
        if data is None or wanted != loaded:
            data = PRTSDataModule(
                lambda plan=plan: plan.prepare(Stopwatch()),
                plan.preparation.splitter,
                use=plan.data.use,
                scale=plan.data.scale,
            )
            data.setup()
            loaded = wanted
        started = time.perf_counter()
        pcc, epoch = validation_pcc(plan, data)
        print(f"| `{given}` | {pcc:.4f} | {epoch} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    logging.getLogger("prts").setLevel(logging.WARNING)
    main(sys.argv[1], sys.argv[2:])
