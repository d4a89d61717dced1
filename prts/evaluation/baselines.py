"""Seven baselines for every model, fitted on its training nuclei and tuned on its validation nuclei.

| name | input |
|---|---|
| gene_mean | nothing |
| position | position among the training nuclei of the same section (absent if the section has none) |
| colour | 12 color statistics of tile and nucleus |
| context | 42 color statistics around the nucleus, at seven scales |
| morphology | shape and crowding of the polygons (absent if the units are bins) |
| ridge | the model's features |
| permuted | the same features, with counts permuted among training nuclei: its PCC is 0 unless information leaks into the test |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.stats import t as student

from prts.data.on_disk import scratch
from prts.data.splits import block_labels
from prts.evaluation.baseline_features import with_colour, with_context, with_morphology
from prts.evaluation.expression import pearson_per_gene
from prts.models.ridge import LinearBaseline, gene_mean, permuted, ridge

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet
    from prts.data.prepare import PreparedTissue

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
PredictFn = Callable[["NucleusSet"], Floats]
"""Expected UMI (n, g) of the nuclei of a section."""

NEIGHBOURS = (10, 30, 100, 300)
# Enough to compare numbers of neighbors.
_VAL_NUCLEI = 5000
_LEAKAGE_PCC = 0.02
# Exceeded by chance once in 370 runs: three standard deviations of a normal distribution, two-sided.
_LEAKAGE_QUANTILE = 0.99865
# With fewer genes, the scatter is too uncertain to reject a run.
_LEAKAGE_GENES = 10
_CHUNK = 4096


@dataclass(frozen=True)
class FittedBaseline:
    """A linear baseline and what it sees.

    Parameters
    ----------
    linear
        The fitted map.
    describe
        Replaces the features of nuclei with the baseline's input; None: the same input as the model.
    """

    linear: LinearBaseline
    describe: Callable[[Sequence[NucleusSet]], list[NucleusSet]] | None = None

    def __call__(self, nuclei: NucleusSet) -> Floats:
        """Expected UMI (n, g) of nuclei of one section."""
        seen = nuclei if self.describe is None else self.describe([nuclei])[0]
        return self.linear.predict(seen.features, scratch(nuclei))


def fit_baselines(
    train: Sequence[NucleusSet], val: Sequence[NucleusSet], tissue: PreparedTissue, *, seed: int = 0
) -> dict[str, FittedBaseline]:
    """Fit every baseline except `position`, which depends on the section to predict (`fit_position`).

    Parameters
    ----------
    train, val
        Training and validation nuclei; penalties are chosen on the latter.
    tissue
        The tissue, with colors and polygons of the nuclei.
    seed
        Seed of the permutations.
    """
    fitted = {"gene_mean": FittedBaseline(gene_mean(train))}
    described_by = {"colour": with_colour, "context": with_context}
    if not tissue.bins:  # bins are squares of one size: nothing to learn from their shape
        described_by["morphology"] = with_morphology
    for name, described in described_by.items():
        describe = partial(described, tissue=tissue)
        fitted[name] = FittedBaseline(ridge(describe(train), describe(val), name=name), describe)
    fitted["ridge"] = FittedBaseline(ridge(train, val))
    fitted["permuted"] = FittedBaseline(ridge(permuted(train, seed=seed), val, name="permuted"))
    return fitted


@dataclass(frozen=True)
class Position:
    """Mean log1p UMI of the k nearest training nuclei of the same section, as UMI.

    Parameters
    ----------
    train
        Training nuclei of the section.
    k
        Number of neighbors.
    """

    train: NucleusSet
    k: int

    def __call__(self, nuclei: NucleusSet) -> Floats:
        """Expected UMI (n, g) of nuclei of the section."""
        k = min(self.k, len(self.train))
        tree, umi = cKDTree(self.train.xy_um), scratch(nuclei)
        # block by block of tissue, whose nuclei share most of their neighbors
        block = block_labels(nuclei.xy_um, max(1, len(nuclei) // _CHUNK))
        for rows in np.split(np.argsort(block, kind="stable"), np.flatnonzero(np.diff(np.sort(block))) + 1):
            _, near = tree.query(nuclei.xy_um[rows], k=[*range(1, k + 1)])
            used, place = np.unique(near, return_inverse=True)
            weights = sp.csr_matrix(
                (np.full(near.size, 1 / k), place.ravel(), np.arange(0, near.size + 1, k)), (len(rows), len(used))
            )
            umi[rows] = np.expm1((weights @ self.train.counts[used].log1p()).toarray().astype(np.float32))
        return umi


def fit_position(train: Sequence[NucleusSet], val: Sequence[NucleusSet], section: str) -> Position | None:
    """Fit the `position` baseline of a section; None if it has no training nuclei.

    The number of neighbors is the one of 10, 30, 100 and 300 with the greatest mean per-gene PCC on the section's validation nuclei (at
    most 5,000, evenly chosen), or 100 if it has none.

    Parameters
    ----------
    train, val
        Training and validation nuclei.
    section
        The section to predict.
    """
    mine = [nuclei for nuclei in train if nuclei.section == section]
    if not mine:
        logger.info("baseline position: skipped for %s, which has no training nuclei", section)
        return None
    held_out = [nuclei for nuclei in val if nuclei.section == section]
    if not held_out:
        return Position(mine[0], 100)
    every = len(held_out[0])
    judges = held_out[0].take(np.linspace(0, every - 1, min(every, _VAL_NUCLEI)).astype(np.intp))
    scores = [
        float(np.nanmean(pearson_per_gene(judges.counts, Position(mine[0], k)(judges)))) if judges.counts.nnz else 0.0
        for k in NEIGHBOURS
    ]
    best = int(np.argmax(scores))
    logger.info("baseline position: %d neighbors, validation PCC %.4f", NEIGHBOURS[best], scores[best])
    return Position(mine[0], NEIGHBOURS[best])


def refuse_leakage(pcc: NDArray[np.float64], section: str) -> None:
    """Stop if the permuted baseline predicts the test: |mean PCC| above .02 + the 99.865% quantile of its scatter by chance.

    Genes are permuted independently, so their PCCs scatter independently around 0: the standard error of their mean is sd / sqrt(genes),
    and the mean divided by it follows Student's t, whose quantile is 3 for many genes and much larger for a few. With fewer than 10 genes
    this is only a warning.

    Parameters
    ----------
    pcc
        Per-gene PCC of the `permuted` baseline, (n_genes,); NaN for genes that are constant.
    section
        The test section.

    Raises
    ------
    RuntimeError
        If it does, with 10 or more genes.
    """
    known = pcc[np.isfinite(pcc)]
    if len(known) < 2:
        return
    mean, error = float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known)))
    bound = _LEAKAGE_PCC + float(student.ppf(_LEAKAGE_QUANTILE, len(known) - 1)) * error
    if abs(mean) <= bound:
        return
    finding = (
        f"leakage: ridge regression on permuted features has a mean PCC of {mean:.3f} on {section} instead of about 0 "
        f"(at most {bound:.3f})"
    )
    if len(known) < _LEAKAGE_GENES:
        logger.warning("%s; %d genes are too few to exclude chance", finding, len(known))
        return
    raise RuntimeError(
        f"{finding}: the model was trained on test nuclei or the metric is wrong; do not trust any result of this run"
    )
