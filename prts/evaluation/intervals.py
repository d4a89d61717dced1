"""How often measured counts are inside a model's intervals, and how wide these are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from prts.data.gene_arrays import gene_slices
from prts.models.uncertainty import BELOW, LEVEL, CountIntervals, Ints

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet
    from prts.evaluation.scored_section import ScoredSection


def marginal_bounds(sets: Iterable[NucleusSet], *, level: float = LEVEL) -> tuple[Ints, Ints]:
    """The narrowest interval of each gene that covers `level` of its counts over all nuclei of some sections.

    A useful model has narrower intervals. Returns lower and upper bounds, each (g,).
    """
    parts = list(sets)
    n, n_genes = sum(map(len, parts)), parts[0].counts.shape[1]
    lower, upper = np.zeros(n_genes, np.int32), np.zeros(n_genes, np.int32)
    columns = [part.counts.tocsc() for part in parts]
    for genes in gene_slices(n, n_genes):
        ordered = np.sort(np.concatenate([part[:, genes].toarray() for part in columns]), axis=0)
        inside = min(n, int(np.ceil((n + 1) * level)))
        starts = np.unique([int(share * (n - inside)) for share in BELOW])
        width = np.stack([ordered[start + inside - 1] - ordered[start] for start in starts])
        start = starts[width.argmin(axis=0)]
        at = np.arange(ordered.shape[1])
        lower[genes], upper[genes] = ordered[start, at], ordered[start + inside - 1, at]
    return lower, upper


def score_intervals(scored: ScoredSection, intervals: CountIntervals, marginal: tuple[Ints, Ints]) -> ScoredSection:
    """Add coverage and width of the intervals to the scores of a section.

    Parameters
    ----------
    scored
        The model's prediction of the section.
    intervals
        The model's intervals.
    marginal
        From `marginal_bounds`.

    Returns
    -------
    The same with four more metrics, in the summary and per gene: `coverage90` and `interval_width` (0 where an interval is one count), and
    both for the marginal intervals (`_marginal`).
    """
    table = intervals.table()
    columns = scored.nuclei.counts.tocsc()
    n, n_genes = columns.shape
    figures = {
        f"{name}{end}": np.zeros(n_genes) for name in ("coverage90", "interval_width") for end in ("", "_marginal")
    }
    for genes in gene_slices(n, n_genes):
        k = columns[:, genes].toarray()
        for end, low, high in (
            ("", *intervals.bounds(scored.umi[:, genes], table, genes)),
            ("_marginal", marginal[0][genes], marginal[1][genes]),
        ):
            figures[f"coverage90{end}"][genes] = ((low <= k) & (k <= high)).mean(axis=0)
            figures[f"interval_width{end}"][genes] = np.broadcast_to(high - low, k.shape).mean(axis=0)
    means = {name: float(values.mean()) for name, values in figures.items()}
    result = replace(
        scored.result, summary=scored.result.summary | means, per_gene=scored.result.per_gene.assign(**figures)
    )
    return replace(scored, result=result)
