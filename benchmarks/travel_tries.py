"""Validation PCC of several settings of `prts train`, and what each loses on variants of the validation image, without test and run folder.

usage: python -m benchmarks.travel_tries "tissue=demo experiment=context" "" "encoder.augment=4" "data.scale=slide"

The first argument is common to all tries; each other one is a try, "" for the common settings as they are. All must read the same input.
Prints, for each, validation PCC with its 95% interval and seconds of processor time, and then a table of the mean PCC on each variant
(benchmarks/variants.py) of the first validation section, over at most 4,000 units. The mean and spread of a slide (`data.scale=slide`) are
those of all its units, as in prediction.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from geopandas import GeoDataFrame
from numpy.typing import NDArray

from benchmarks.travel import UNITS, some
from benchmarks.variants import NAMES, variant
from prts.api.training_plan import TrainingPlan
from prts.cli.check import check_config
from prts.cli.train import training_plan
from prts.data.datamodule import PRTSDataModule
from prts.data.prepare_input import prepare_input
from prts.data.prepared import PreparedSection
from prts.data.slide_scale import SlideScale
from prts.evaluation.bootstrap import BlockSums, block_sums, mean_pcc_difference, mean_pcc_interval, spatial_blocks
from prts.features.feature_reader import InputReader
from prts.io.nuclei import load_nuclei
from prts.models.fit import fit
from prts.models.module import seed_everything
from prts.models.output import choose_output
from prts.models.predictor import Predictor
from prts.section import Section
from prts.stopwatch import Stopwatch


class Tried(NamedTuple):
    """A fitted try."""

    model: Predictor
    scale: SlideScale | None


class Judge:
    """Scores models on a section and on variants of its image.

    Parameters
    ----------
    data
        The data of the first try, set up.
    plan
        Its plan.
    """

    def __init__(self, data: PRTSDataModule, plan: TrainingPlan) -> None:
        self._use, self._encoder = data.use, plan.preparation.encoder
        self._prepared: PreparedSection = data.tissue.sections[data.tissue.val[0]]
        nuclei = data.val_sets[0]
        rows = some(len(nuclei), UNITS)
        self._ids, self._measured = nuclei.cell_id[rows], nuclei.counts[rows]
        self._blocks, _ = spatial_blocks(nuclei.xy_um[rows])
        self._all = load_nuclei(self._prepared.nuclei)

    def score(self, section: Section, folder: Path, tries: list[Tried]) -> list[BlockSums]:
        """Block sums of each model on a section that is this one with another image."""
        whole = any(tried.scale is not None for tried in tries)
        read = self._all if whole else self._all.set_index("cell_id").loc[self._ids].reset_index(names="cell_id")
        moved, among = (section.orientation.nuclei(part, section.file_size) for part in (read, self._all))
        features = self._features(section, folder, moved, among)
        at = read.set_index("cell_id").index.get_indexer(self._ids)
        return [
            block_sums(self._measured, tried.model.predict_all(_matched(features, tried.scale)[at])[0], self._blocks)
            for tried in tries
        ]

    def _features(
        self, section: Section, folder: Path, nuclei: GeoDataFrame, among: GeoDataFrame
    ) -> NDArray[np.float32]:
        stores = prepare_input(folder, section, nuclei, self._use, lambda: self._encoder, f"read-{len(nuclei)}")
        reader = InputReader(stores.features, self._use, lambda: among, section.mpp, stores.context)
        return reader(nuclei["cell_id"].to_numpy())

    def variants(self, folder: Path) -> Iterator[tuple[str, Section]]:
        """The section as it is, then each variant."""
        yield "unchanged", self._prepared.section
        for name in NAMES:
            yield name, variant(self._prepared.section, name, folder)


def _matched(features: NDArray[np.float32], scale: SlideScale | None) -> NDArray[np.float32]:
    return features if scale is None else scale.match(features.copy(), scale.moments([features]))


def fitted(plan: TrainingPlan) -> tuple[Tried, PRTSDataModule]:
    """Fit a try."""
    data = PRTSDataModule(
        lambda: plan.prepare(Stopwatch()), plan.preparation.splitter, use=plan.data.use, scale=plan.data.scale
    )
    data.setup()
    seed_everything(plan.recipe.seed)
    data.batch_size, data.seed = plan.data.batch_size, plan.recipe.seed
    made = fit(plan.recipe, data)
    rule = choose_output(made.net, made.likelihood, data.val_sets, made.output)
    return Tried(Predictor(made.net, made.likelihood, rule), data.slide_scale), data


def main(common: str, given: list[str]) -> None:
    """Print the tables."""
    tries: list[Tried] = []
    judge: Judge | None = None
    print("| settings | validation PCC | CPU s |\n|---|---|---|", flush=True)
    for settings in given:
        started = time.process_time()
        plan = training_plan(check_config("train", [*common.split(), *settings.split()]))
        tried, data = fitted(plan)
        tries.append(tried)
        spent = time.process_time() - started
        judge = judge or Judge(data, plan)
        nuclei = data.val_sets[0]
        blocks, _ = spatial_blocks(nuclei.xy_um)
        sums = block_sums(nuclei.counts[:], tried.model.predict_all(nuclei.features[:])[0], blocks)
        low, high = mean_pcc_interval(sums)
        print(f"| `{settings}` | {_mean(sums):.4f} ({low:.3f} to {high:.3f}) | {spent:.0f} |", flush=True)
        del data, sums
    assert judge is not None
    print(f"\n| image | {' | '.join(f'`{settings}`' for settings in given)} |\n|---|{'---|' * len(given)}", flush=True)
    unchanged: list[BlockSums] = []
    means: list[list[float]] = []
    with tempfile.TemporaryDirectory() as name:
        for changed, section in judge.variants(Path(name)):
            found = judge.score(section, Path(name), tries)
            unchanged = unchanged or found
            means.append([_mean(sums) for sums in found])
            cells = [_cell(sums, plain) for sums, plain in zip(found, unchanged, strict=True)]
            print(f"| {changed} | {' | '.join(cells)} |", flush=True)
    table = np.array(means)
    over, lost = table[1:].mean(axis=0), 1 - table[1:].mean(axis=0) / table[0]
    cells = [f"{mean:.3f}, {-share:+.0%}" for mean, share in zip(over, lost, strict=True)]
    print(f"| **mean of the variants** | {' | '.join(cells)} |")


def _mean(sums: BlockSums) -> float:
    return float(sums.mean_pcc(np.ones((1, len(sums.n))))[0])


def _cell(sums: BlockSums, plain: BlockSums) -> str:
    if sums is plain:
        return f"{_mean(sums):.3f}"
    difference, low, high = mean_pcc_difference(sums, plain)
    return f"{_mean(sums):.3f}, {difference:+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(sys.argv[1], sys.argv[2:])
