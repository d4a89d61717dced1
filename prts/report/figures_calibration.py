"""Calibration of a prediction: P(expressed) against observed frequency, and predicted against measured UMI."""

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
    """Observed frequency of detection by predicted P(expressed), over all nuclei and genes.

    Parameters
    ----------
    measured
        Counts, (n_nuclei, n_genes).
    prob
        P(expressed), (n_nuclei, n_genes).

    Returns
    -------
    One row per bin of equal width in [0, 1]: number `n` of nucleus-gene pairs, their mean `predicted` probability and the `observed` share
    with a count; NaN for empty bins.
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
    """Mean UMI of each gene in deciles of its predicted value, relative to the gene's measured mean.

    Parameters
    ----------
    measured
        Counts, (n_nuclei, n_genes).
    umi
        Predicted UMI, (n_nuclei, n_genes).

    Returns
    -------
    Predicted and measured means, lowest decile first, for genes with at least 100 measured UMI, (2, 10, n_kept_genes).
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
    """Reliability of P(expressed), and predicted against measured UMI in deciles of nuclei.

    Parameters
    ----------
    out
        One or more paths with the suffix .png, .pdf or .svg.
    measured
        Counts of at least ten nuclei, (n_nuclei, n_genes).
    umi, prob
        Prediction of the same nuclei and genes, (n_nuclei, n_genes).
    """
    bins = reliability(measured, prob)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        (chance, level), (spread, _) = figure.subplots(2, 2, height_ratios=(4, 1), sharex="col")
        _draw_reliability(chance, bins)
        spread.bar((np.arange(_BINS) + 0.5) / _BINS, bins["n"], width=0.9 / _BINS, color=GREY)
        spread.set(xlabel="predicted P(expressed)", ylabel="nucleus-gene\npairs", yscale="log", xlim=(0, 1))
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
    axes.plot(known["predicted"], known["observed"], color=BLUE, marker="o", markersize=3, linewidth=1, clip_on=False)
    axes.text(0.03, 0.97, f"calibration error {error:.3f}", transform=axes.transAxes, va="top")
    axes.set(ylabel="observed share expressed", ylim=(0, 1), title="Detection")


def _draw_levels(axes: Axes, groups: NDArray[np.float64]) -> None:
    axes.set(
        xlabel="predicted UMI / mean measured UMI", ylabel="measured UMI / mean measured UMI", title="Expression level"
    )
    if not groups.shape[2]:
        axes.text(0.5, 0.5, f"no gene has {_MIN_UMI} UMI or more", transform=axes.transAxes, ha="center")
        return
    predicted, measured = groups.mean(axis=2)
    low, high = np.percentile(groups[1], (25, 75), axis=1)
    reach = 1.08 * max(predicted.max(), measured.max(), high.max())
    axes.plot([0, reach], [0, reach], color=GREY, linewidth=0.8, linestyle="--")
    axes.vlines(predicted, low, high, color=ORANGE, linewidth=0.8, alpha=0.6)
    axes.plot(predicted, measured, color=ORANGE, marker="o", markersize=3, linewidth=1)
    text = f"deciles of predicted UMI:\nmean of {groups.shape[2]} genes, bars: quartiles"
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top")
    axes.set(xlim=(0, 1.08 * predicted.max()), ylim=(0, reach))
