"""Validation scores of ways to train a network that are no options of prts: is any of them worth becoming one?

usage: python -m benchmarks.head_tries "tissue=her2st experiment=context encoder=dinov2_bins" [every=5] [seeds=2] [part=test] [TRY ...]

The first argument gives the reference, as for `prts train`; the names in `TRIES` choose among the tries (default: all that the tissue
allows). `every=5` takes every fifth unit, `seeds=2` trains with seeds 1 and 2 instead of 1, 2 and 3. Prints, for each try: mean per-gene
PCC of the first validation section and, where spots were measured, over spots, as means over the seeds; the difference from the reference
with its 95% interval over resampled blocks or spots, the same for all; and seconds of processor time of a fit. `part=test` scores the first
test section instead; epochs are always chosen on validation. The training loop is a plain one (benchmarks/head_training.py), which keeps
the epoch of the best validation PCC, as `prts train` does. Features are as they are, whatever `data.scale` is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

from benchmarks.head_training import (
    Fitted,
    Floats,
    Setting,
    Spotted,
    Units,
    fit,
    matched,
    of_low_rank,
    of_neighbours,
    with_own_batch_statistics,
)
from prts.cli.check import check_config
from prts.cli.train import training_plan
from prts.data.datamodule import PRTSDataModule
from prts.data.nucleus_set import NucleusSet
from prts.evaluation.bootstrap import BlockSums, block_sums, resampling_weights, spatial_blocks
from prts.evaluation.spot_scores import sum_in_spots
from prts.features.context import DENSITY
from prts.io.optical_density import read_without_black
from prts.io.slide import open_slide
from prts.io.spots import read_spots
from prts.section import Section
from prts.stopwatch import Stopwatch

SEEDS = 3
WIDE_UM = (384.0, 768.0)
_WIDE_MPP = 16.0
_NEAREST = 64


class Lab:
    """Fits settings once for each seed, and scores predictions of the judged section against the reference.

    Parameters
    ----------
    train, val, judged
        Units that are learned from, choose epochs, and are scored.
    reference
        The setting that tries are compared with.
    seeds
        How many networks a setting is trained for.
    """

    def __init__(self, train: Units, val: Units, judged: Units, reference: Setting, seeds: int = SEEDS) -> None:
        self.train, self.val, self.judged, self.reference = train, val, judged, reference
        self.seeds = range(1, seeds + 1)
        self._fitted: dict[tuple[Setting, int], Fitted] = {}
        self._blocks, _ = spatial_blocks(judged.xy_um)
        self.baseline = self.score([model.predict(judged) for model in self.models(reference)])

    def models(self, setting: Setting) -> list[Fitted]:
        """The networks of a setting, one for each seed."""
        for seed in self.seeds:
            if (setting, seed) not in self._fitted:
                self._fitted[setting, seed] = fit(self.train, self.val, setting, seed)
        return [self._fitted[setting, seed] for seed in self.seeds]

    def score(self, predictions: Sequence[Floats]) -> list[NDArray[np.float64]]:
        """Mean PCC over nuclei, then spots, and its bootstrap replicates behind it, averaged over predictions."""
        units, spots = self.judged, self.judged.spots
        nuclei = [block_sums(sp.csr_matrix(units.umi), umi, self._blocks) for umi in predictions]
        found = [np.mean([_replicates(sums) for sums in nuclei], axis=0)]
        if spots is not None:
            each = np.arange(len(spots.umi))
            sums = [block_sums(sp.csr_matrix(spots.umi), spots.member @ umi, each) for umi in predictions]
            found.append(np.mean([_replicates(part) for part in sums], axis=0))
        return found

    def row(self, name: str, predictions: Sequence[Floats], seconds: float) -> str:
        """A row of the table."""
        cells = []
        for found, reference in zip(self.score(predictions), self.baseline, strict=True):
            low, high = np.percentile((found - reference)[1:], [2.5, 97.5])
            cells.append(f"{found[0]:.4f} | {found[0] - reference[0]:+.4f} ({low:+.4f} to {high:+.4f})")
        return f"| {name} | {' | '.join(cells)} | {seconds:.0f} |"


def _replicates(sums: BlockSums) -> NDArray[np.float64]:
    every = np.ones((1, len(sums.n)))
    return sums.mean_pcc(np.vstack([every, resampling_weights(len(sums.n), 1000, 0)]))


Tried = tuple[list[Floats], float]


def _changed(**changes: Any) -> Callable[[Lab], Tried]:
    """A try that changes settings of the reference."""

    def run(lab: Lab) -> Tried:
        return _predicted(lab, lab.models(replace(lab.reference, **changes)))

    return run


def _predicted(lab: Lab, models: list[Fitted]) -> Tried:
    return [model.predict(lab.judged) for model in models], sum(model.seconds for model in models) / len(models)


def _with_tokens(**changes: Any) -> Callable[[Lab], Tried]:
    return lambda lab: _changed(use=(*lab.reference.use, "local"), **changes)(lab)


def _with_wide(lab: Lab) -> Tried:
    return _changed(use=(*lab.reference.use, "wide"))(lab)


def _mean_of_seeds(*changes: dict[str, Any]) -> Callable[[Lab], Tried]:
    """The mean of the predictions of all seeds of one or more settings."""

    def run(lab: Lab) -> Tried:
        tried = [_changed(**change)(lab) for change in changes]
        predictions = [umi for found, _ in tried for umi in found]
        return [np.mean(predictions, axis=0)], len(lab.seeds) * sum(seconds for _, seconds in tried)

    return run


def _with_encoder_free(lab: Lab) -> Tried:
    """For each seed, the mean of a model with the encoder and one without."""
    free = tuple(name for name in lab.reference.use if name not in ("local", "global")) or ("context",)
    found = [_changed(use=use)(lab) for use in (free, (*free, "local"))]
    means = [np.mean(pair, axis=0) for pair in zip(*(umi for umi, _ in found), strict=True)]
    return means, sum(seconds for _, seconds in found)


def _library_and_profile(lab: Lab) -> Tried:
    """UMI of all genes together from one network, times the shares of the genes from another."""
    total = [replace(units, umi=units.umi.sum(axis=1, keepdims=True)) for units in (lab.train, lab.val, lab.judged)]
    shares = lab.models(replace(lab.reference, offset="library"))
    alone = replace(lab.reference, lambda_2=0.0, rank=None)
    library = [fit(total[0], total[1], alone, seed) for seed in lab.seeds]
    predictions = []
    for size, share in zip(library, shares, strict=True):
        profile = share.predict(lab.judged)
        predictions.append(size.predict(total[2]) * profile / profile.sum(axis=1, keepdims=True))
    return predictions, sum(model.seconds for model in (*shares, *library)) / len(lab.seeds)


def _adapted(lab: Lab) -> Tried:
    models = lab.models(lab.reference)
    return [with_own_batch_statistics(model, lab.judged).predict(lab.judged) for model in models], 0.0


def _matched(spread: bool) -> Callable[[Lab], Tried]:
    def run(lab: Lab) -> Tried:
        val, judged = (matched(units, lab.train, spread=spread) for units in (lab.val, lab.judged))
        models = [fit(lab.train, val, lab.reference, seed) for seed in lab.seeds]
        return [model.predict(judged) for model in models], sum(model.seconds for model in models) / len(lab.seeds)

    return run


_BINS_HEAD = {
    "rank": 64,
    "dropout": 0.3,
    "lr": 0.004,
    "one_cycle": True,
    "epochs": 12,
    "patience": 12,
    "batch_size": 512,
}

TRIES: dict[str, Callable[[Lab], Tried]] = {
    "reference": _changed(),
    "tokens": _with_tokens(),
    "tokens, dropout 0.7": _with_tokens(dropout=0.7),
    "tokens, rank 64": _with_tokens(rank=64),
    "tokens, head of bins": _with_tokens(**_BINS_HEAD),
    "head of bins": _changed(**_BINS_HEAD),
    "wide context": _with_wide,
    "attention, 16 nearest": _changed(near=16),
    "attention, 64 nearest": _changed(near=64),
    "three seeds": _mean_of_seeds({}),
    "with and without encoder": _with_encoder_free,
    "smoothed counts": _changed(auxiliary=of_neighbours),
    "low-rank counts": _changed(auxiliary=of_low_rank),
    "library x profile": _library_and_profile,
    "AdaBN": _adapted,
    "slide mean": _matched(spread=False),
    "slide mean and spread": _matched(spread=True),
    "spot sums": _changed(spots=1.0),
    "spot sums, weight 3": _changed(spots=3.0),
    "spot sums, three seeds": _mean_of_seeds({"spots": 1.0}),
}


def wide(section: Section, xy_um: NDArray[np.float64]) -> Floats:
    """Mean and standard deviation of the optical densities at scales beyond those of `context`, (n, 12)."""
    with open_slide(section.image, mpp=section.mpp) as slide:
        size = [int(np.ceil(side * slide.mpp / _WIDE_MPP)) for side in (slide.width, slide.height)]
        density = DENSITY[read_without_black(slide, 0, 0, *size, _WIDE_MPP)]
    at = (xy_um / _WIDE_MPP - 0.5).T[::-1]
    columns = []
    for sigma in WIDE_UM:
        for channel in np.moveaxis(density, 2, 0):
            first, square = (
                map_coordinates(gaussian_filter(channel**power, sigma / _WIDE_MPP, mode="constant"), at, order=1)
                for power in (1, 2)
            )
            columns += [first, np.sqrt((square - first * first).clip(0))]
    return np.stack(columns, axis=1).astype(np.float32)


def load(data: PRTSDataModule, nuclei: NucleusSet, every: int) -> Units:
    """Every n-th unit of a section, with the nearest of all."""
    section, panel = data.tissue.sections[nuclei.section].section, data.panel
    stops = np.cumsum([data.feature_widths[name] for name in data.use])[:-1]
    pool = dict(zip(data.use, np.split(nuclei.features[:], stops, axis=1), strict=True))
    rows = np.arange(0, len(nuclei), every)
    distance, near = cKDTree(nuclei.xy_um).query(nuclei.xy_um[rows], _NEAREST + 1)
    umi = nuclei.counts[rows].toarray().astype(np.float32)
    spots = None
    if section.spots is not None and every == 1:
        given, at = read_spots(section.spots), nuclei.xy_um / section.mpp
        inside = sp.eye_array(len(nuclei), dtype=np.float32, format="csr")
        measured, member = sum_in_spots(inside, at, given, panel.genes, panel.gene_ids)
        spots = Spotted(sp.csr_matrix(member, dtype=np.float32), measured.toarray().astype(np.float32))
    some = {name: block[rows] for name, block in pool.items()}
    some["wide"] = wide(section, nuclei.xy_um[rows])
    return Units(some, umi, nuclei.xy_um[rows], near[:, 1:], distance[:, 1:].astype(np.float32), pool, spots)


def _allowed(name: str, lab: Lab) -> bool:
    return not (
        (name.startswith("spot") and lab.train.spots is None)
        or (name.startswith("tokens") and "local" in lab.reference.use)
        or (name == "head of bins" and lab.reference.one_cycle)
    )


def main(common: str, every: int, part: str, seeds: int, names: Sequence[str]) -> None:
    """Print the table."""
    reference = Setting.of(check_config("train", common.split()))
    use = (*reference.use, *(name for name in ("context", "local") if name not in reference.use))
    plan = training_plan(check_config("train", [*common.split(), f"data.use=[{','.join(use)}]"]))
    data = PRTSDataModule(lambda: plan.prepare(Stopwatch()), plan.preparation.splitter, use=use, memory="whole")
    data.setup()
    sets = [data.train_sets[0], data.val_sets[0]] + ([data.test_sets[0]] if part == "test" else [])
    units = [load(data, nuclei, every) for nuclei in sets]
    del data
    lab = Lab(units[0], units[1], units[-1], reference, seeds)
    columns = [f"{what} | difference" for what in ("PCC", "spots")[: len(lab.baseline)]]
    print(f"| try | {' | '.join(columns)} | CPU s |\n|---|{'---|' * (2 * len(columns) + 1)}")
    for name in names or [name for name in TRIES if _allowed(name, lab)]:
        print(lab.row(name, *TRIES[name](lab)), flush=True)


if __name__ == "__main__":
    given = [argument.partition("=") for argument in sys.argv[2:]]
    options = {key: value for key, equals, value in given if equals}
    chosen = [key for key, equals, _ in given if not equals]
    if len(sys.argv) < 2 or not options.keys() <= {"every", "part", "seeds"} or not set(chosen) <= TRIES.keys():
        sys.exit(__doc__)
    logging.getLogger("prts").setLevel(logging.WARNING)
    main(
        sys.argv[1], int(options.get("every", 1)), options.get("part", "val"), int(options.get("seeds", SEEDS)), chosen
    )
