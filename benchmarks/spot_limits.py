"""What bounds the PCC over spots: noise of the counts, the UMI of a spot, its profile, or the section that was learned from?

usage: python -m benchmarks.spot_limits "tissue=her2st experiment=context" [part=test]

The first argument is as for `prts train`. Prints, for the first validation section (or test section), the mean per-gene PCC over spots of
predictions that know part of the answer: of ideal ones, of others that know the spot's UMI or its profile, and of a ridge regression of the
spot's UMI on the mean features of its nuclei, their number and their area, learned from the training section or from other square
millimetres of the section itself. The last rows compare neighbouring spots: what tissue decides is alike in them.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.head_training import Floats, Setting, Units, fit, pcc
from benchmarks.head_tries import SEEDS, load
from prts.cli.check import check_config
from prts.cli.train import training_plan
from prts.data.datamodule import PRTSDataModule
from prts.evaluation.bootstrap import spatial_blocks
from prts.evaluation.ceiling import noise_ceiling
from prts.stopwatch import Stopwatch

_FOLD_UM = 1000.0
_FOLDS = 8
# spots lie 200 um apart
_NEIGHBOUR_UM = 250.0


class SpotView:
    """The spots of a section: measured UMI (s, g), centers (s, 2) in um, and the mean features of their nuclei, (s, d)."""

    def __init__(self, units: Units, use: tuple[str, ...]) -> None:
        assert units.spots is not None
        member, self.umi = units.spots.member, units.spots.umi
        self.n = np.asarray(member.sum(axis=1)).reshape(-1, 1)
        self.xy_um = member @ units.xy_um / self.n
        self.seen = np.hstack([member @ units.features(use) / self.n, np.log(self.n)])
        self.total = self.umi.sum(axis=1, keepdims=True)
        self.log_total = np.log(self.total[:, 0])
        self.in_nuclei = member @ units.umi
        self.member = member

    def folds(self) -> NDArray[np.int64]:
        """Which square of the section each spot is in."""
        cell = np.floor((self.xy_um - self.xy_um.min(axis=0)) / _FOLD_UM).astype(np.int64)
        folds: NDArray[np.int64] = cell[:, 0] * 1000 + cell[:, 1]
        return folds

    def nearest(self, k: int) -> NDArray[np.float64]:
        """Mean UMI of the k nearest other spots."""
        near = cKDTree(self.xy_um).query(self.xy_um, k + 1)[1][:, 1:]
        mean: NDArray[np.float64] = self.umi[near].mean(axis=1)
        return mean

    def alike(self, values: NDArray[np.float64]) -> float:
        """Correlation of neighbouring spots."""
        pairs = cKDTree(self.xy_um).query_pairs(_NEIGHBOUR_UM, output_type="ndarray")
        z = values - values.mean()
        return float((z[pairs[:, 0]] * z[pairs[:, 1]]).mean() / z.var())


def rows(train: Units, val: Units, judged: Units, setting: Setting) -> list[tuple[str, float]]:
    """The names and figures of the table."""
    spots, learned = SpotView(judged, setting.use), SpotView(train, setting.use)
    share: Floats = spots.umi.sum(axis=0) / spots.umi.sum()
    ceiling = noise_ceiling(sp.csr_matrix(spots.umi.astype(np.int64)), spatial_blocks(spots.xy_um)[0])["ceiling"].mean()
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 25)))
    across = ridge.fit(learned.seen, learned.log_total).predict(spots.seen)
    within = cross_val_predict(ridge, spots.seen, spots.log_total, cv=GroupKFold(_FOLDS), groups=spots.folds())
    summed = np.mean(
        [spots.member @ fit(train, val, setting, seed).predict(judged) for seed in range(1, SEEDS + 1)], axis=0
    )
    size = summed.sum(axis=1, keepdims=True)

    def score(predicted: NDArray[np.floating]) -> float:
        return pcc(spots.umi, predicted.astype(np.float32))

    def r(log_total: NDArray[np.floating]) -> float:
        return float(np.corrcoef(spots.log_total, log_total)[0, 1])

    return [
        ("noise ceiling of the spots' counts", float(ceiling)),
        ("measured UMI of the nuclei in the spot", score(spots.in_nuclei)),
        ("gene means x measured UMI of the spot", score(spots.total * share)),
        ("gene means x number of nuclei", score(spots.n * (spots.total.sum() / spots.n.sum()) * share)),
        *((f"mean of the {k} nearest measured spots", score(spots.nearest(k))) for k in (4, 8)),
        ("network, mean of three seeds", score(summed)),
        ("gene means x UMI of the network", score(size * share)),
        ("profile of the network x measured UMI of the spot", score(summed / size * spots.total)),
        ("measured profile x UMI of the network", score(spots.umi / spots.total * size)),
        (
            "gene means x ridge of the spot's UMI, learned from the training section",
            score(np.exp(across)[:, None] * share),
        ),
        ("gene means x ridge of the spot's UMI, learned within the section", score(np.exp(within)[:, None] * share)),
        ("correlation of log UMI of a spot: network", r(np.log(size[:, 0]))),
        ("correlation of log UMI of a spot: ridge of the training section", r(across)),
        ("correlation of log UMI of a spot: ridge within the section", r(within)),
        ("correlation of neighbouring spots: log UMI", spots.alike(spots.log_total)),
        ("correlation of neighbouring spots: log UMI minus ridge", spots.alike(spots.log_total - across)),
    ]


def main(common: str, part: str) -> None:
    """Print the table."""
    cfg = check_config("train", common.split())
    plan, setting = training_plan(cfg), Setting.of(cfg)
    data = PRTSDataModule(lambda: plan.prepare(Stopwatch()), plan.preparation.splitter, use=setting.use)
    data.setup()
    train, val, *test = (
        load(data, sets[0], 1) for sets in (data.train_sets, data.val_sets, *([data.test_sets] * (part == "test")))
    )
    print("| | |\n|---|---|")
    for name, value in rows(train, val, (test or [val])[0], setting):
        print(f"| {name} | {value:.3f} |")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["part=val"], ["part=test"]):
        sys.exit(__doc__)
    logging.getLogger("prts").setLevel(logging.WARNING)
    main(sys.argv[1], "test" if sys.argv[2:] == ["part=test"] else "val")
