"""Sets of genes whose mean PCC is also reported on its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from prts.data.nucleus_set import CountBlocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.data.nucleus_set import NucleusSet
    from prts.preprocess.panel import Panel

logger = logging.getLogger(__name__)


def gene_sets(train_sets: Sequence[NucleusSet], panel: Panel, markers: Sequence[str]) -> dict[str, NDArray[np.intp]]:
    """Positions in the panel of the sets `hvg50`, `hvg200` and, if the panel has any of them, `markers`.

    Parameters
    ----------
    train_sets
        Training nuclei.
    panel
        The genes.
    markers
        Names of the tissue's marker genes; those missing from the panel are left out.
    """
    sets = variable_genes(train_sets)
    found = np.flatnonzero(np.isin(np.array(panel.genes, dtype=object), np.array(markers, dtype=object)))
    if len(found):
        sets["markers"] = found
    if len(found) < len(markers):
        logger.info("gene set markers: %d of the tissue's %d are in the panel", len(found), len(markers))
    return sets


def variable_genes(train_sets: Sequence[NucleusSet]) -> dict[str, NDArray[np.intp]]:
    """Positions of the most variable genes in training nuclei, `hvg50` and `hvg200`, most variable first.

    Variance of log1p of counts scaled to the median total of all genes, as in `prts.preprocess.panel.TopPanel`.

    Parameters
    ----------
    train_sets
        Training nuclei, all sections together.
    """
    total = np.concatenate([nuclei.total_counts for nuclei in train_sets]).astype(np.float64)
    factor = np.divide(np.median(total[total > 0]), total, out=np.zeros_like(total), where=total > 0)
    n, n_genes = 0, train_sets[0].counts.shape[1]
    sums, squares = np.zeros(n_genes), np.zeros(n_genes)
    for counts in CountBlocks(train_sets):
        level = (sp.diags_array(factor[n : n + counts.shape[0]]) @ counts.astype(np.float64)).tocsr().log1p()
        n += counts.shape[0]
        sums += np.asarray(level.sum(axis=0)).ravel()
        squares += np.asarray(level.multiply(level).sum(axis=0)).ravel()
    variance = squares / n - np.square(sums / n)
    order = np.argsort(-variance, kind="stable")
    return {f"hvg{size}": order[:size] for size in (50, 200)}
