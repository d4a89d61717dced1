"""Whether a prediction means what it says: P(expressed) against how often, predicted against measured UMI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from prts.report.figures_canvas import BLUE, GREY, ORANGE, STYLE, save

if TYPE_CHECKING:
    import scipy.sparse as sp
    from matplotlib.axes import Axes

_BINS = 20
_GROUPS = 10
_MIN_UMI = 100
_ROWS, _GENES = 4096, 128


def reliability(measured: sp.csr_matrix, prob: NDArray[np.float32]) -> pd.DataFrame:
    """How often a gene was measured, by what P(expressed) said, over all nuclei and genes.

    Parameters
    ----------
    measured
        (n, g) counts.
    prob
        (n, g) P(expressed).

    Returns
    -------
    A row a bin of equal width in [0, 1]: `n` pairs of nucleus and gene, their mean `predicted` P and the `observed` share with a
    count; NaN where a bin is empty.
    """
    sums = np.zeros((3, _BINS))
    for start in range(0, len(prob), _ROWS):
        chance = prob[start : start + _ROWS]
        there = measured[start : start + _ROWS].toarray() > 0
        place = np.minimum((chance * _BINS).astype(np.int64), _BINS - 1).ravel()
        weights = (None, chance.ravel(), there.ravel())
        sums += [np.bincount(place, weight, minlength=_BINS) for weight in weights]
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {"n": sums[0].astype(np.int64), "predicted": sums[1] / sums[0], "observed": sums[2] / sums[0]}
        )


def level_groups(measured: sp.csr_matrix, umi: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean UMI of the nuclei of each gene in ten groups by prediction, lowest first, over the gene's measured mean.

    Parameters
    ----------
    measured
        (n, g) counts.
    umi
        (n, g) predicted UMI.

    Returns
    -------
    (2, 10, n_genes) predicted and measured, of the genes with 100 measured UMI or more.
    """
    total = np.asarray(measured.sum(axis=0)).ravel()
    genes = np.flatnonzero(total >= _MIN_UMI)
    n = measured.shape[0]
    starts = np.linspace(0, n, _GROUPS + 1).astype(np.int64)[:-1]
    sizes = np.diff([*starts, n])[:, None]
    groups = np.empty((2, _GROUPS, len(genes)))
    by_gene = measured.tocsc()
    for start in range(0, len(genes), _GENES):
        some = genes[start : start + _GENES]
        order = np.argsort(umi[:, some], axis=0, kind="stable")
        for side, values in enumerate((umi[:, some], by_gene[:, some].toarray())):
            ranked = np.take_along_axis(values, order, axis=0).astype(np.float64)
            groups[side, :, start : start + _GENES] = (
                np.add.reduceat(ranked, starts, axis=0) / sizes / (total[some] / n)
            )
    return groups


def calibration(
    out: Path | Sequence[Path], measured: sp.csr_matrix, umi: NDArray[np.float32], prob: NDArray[np.float32]
) -> None:
    """Reliability of P(expressed), and predicted against measured UMI by tenths of the nuclei.

    Parameters
    ----------
    out
        .png, .pdf or .svg; several for several formats.
    measured
        (n, g) counts, n >= 10.
    umi, prob
        Prediction of the same nuclei and genes, (n, g).
    """
    bins = reliability(measured, prob)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        (chance, level), (spread, _) = figure.subplots(2, 2, height_ratios=(4, 1), sharex="col")
        _draw_reliability(chance, bins)
        spread.bar((np.arange(_BINS) + 0.5) / _BINS, bins["n"], width=0.9 / _BINS, color=GREY)
        spread.set(xlabel="predicted P(expressed)", ylabel="pairs", yscale="log", xlim=(0, 1))
        figure.delaxes(_)
        grid = level.get_gridspec()
        level.set_subplotspec(grid[:, 1])
        level.tick_params(labelbottom=True)
        _draw_levels(level, level_groups(measured, umi))
        save(figure, out)


def _draw_reliability(axes: Axes, bins: pd.DataFrame) -> None:
    known = bins[bins["n"] > 0]
    error = float((known["n"] * (known["predicted"] - known["observed"]).abs()).sum() / known["n"].sum())
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    axes.plot(known["predicted"], known["observed"], color=BLUE, marker="o", markersize=3, linewidth=1)
    axes.text(0.03, 0.97, f"calibration error {error:.3f}", transform=axes.transAxes, va="top")
    axes.set(ylabel="share of nuclei with a count", ylim=(0, 1), title="Is it expressed?")


def _draw_levels(axes: Axes, groups: NDArray[np.float64]) -> None:
    axes.set(xlabel="predicted UMI / mean measured UMI", ylabel="measured UMI / mean measured UMI", title="How much?")
    if not groups.shape[2]:
        axes.text(0.5, 0.5, f"no gene has {_MIN_UMI} UMI", transform=axes.transAxes, ha="center")
        return
    predicted, measured = groups.mean(axis=2)
    low, high = np.percentile(groups[1], (25, 75), axis=1)
    reach = 1.08 * max(predicted.max(), measured.max(), high.max())
    axes.plot([0, reach], [0, reach], color=GREY, linewidth=0.8, linestyle="--")
    axes.vlines(predicted, low, high, color=ORANGE, linewidth=0.8, alpha=0.6)
    axes.plot(predicted, measured, color=ORANGE, marker="o", markersize=3, linewidth=1)
    text = f"tenths of the nuclei by prediction:\nmean of {groups.shape[2]} genes, bars their quartiles"
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top")
    axes.set(xlim=(0, 1.08 * predicted.max()), ylim=(0, reach))
