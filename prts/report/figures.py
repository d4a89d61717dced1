"""Figures of model accuracy: PCC against the noise ceiling, the ceiling against simulated truth, and training curves.

Tissue maps are in `figures_maps`, calibration in `figures_calibration`. Each function saves in the format of the suffix of `out`: .png
(300 dpi), .pdf or .svg, with large numbers of points rasterized and text kept as text. Several paths save one drawing in several formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prts.errors import InputError
from prts.evaluation.ceiling import RELIABLE, ceiling_share
from prts.report.figures_canvas import BLUE, GREY, ORANGE, SEQUENTIAL, STYLE, add_colorbar, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {"loss": "loss", "bin": "detection loss", "reg": "regression loss", "pcc": "mean PCC over genes"}


def pcc_vs_ceiling(per_gene: pd.DataFrame, out: Path | Sequence[Path], *, n_named: int = 8) -> None:
    """PCC of each gene against its noise ceiling, the PCC that a perfect prediction would reach.

    Parameters
    ----------
    per_gene
        `gene, mean_counts, pcc, ceiling` (per_gene.csv). Genes that are constant in the section are not drawn; genes with an unreliable
        ceiling (0) are gray.
    out
        One or more paths with the suffix .png, .pdf or .svg.
    n_named
        Maximum number of genes to label: those with the highest PCC and room for a label.
    """
    table = per_gene.dropna(subset=["pcc", "ceiling"])
    counts = np.maximum(table["mean_counts"].to_numpy(), 1e-4)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        axes.axhline(0, color=GREY, linewidth=0.4, zorder=0)
        reach = table[["pcc", "ceiling"]].to_numpy().max(initial=0.1) * 1.08
        noisy = (table["ceiling"] <= 0).to_numpy()
        points = axes.scatter(
            table["ceiling"][~noisy],
            table["pcc"][~noisy],
            c=counts[~noisy],
            s=7,
            cmap=SEQUENTIAL,
            norm=mpl.colors.LogNorm(*((counts.min(), counts.max()) if len(counts) else (0.01, 1))),
            linewidths=0,
            alpha=0.9,
            rasterized=len(table) > 2000,
        )
        axes.scatter(np.zeros(noisy.sum()), table["pcc"][noisy], s=7, c=GREY, linewidths=0)
        add_colorbar(figure, points, axes, "mean UMI per nucleus")
        _label_genes(axes, table[~noisy], reach, n_named)
        n_reliable = int((table["ceiling"] >= RELIABLE).sum())
        notes = []
        if n_reliable:
            share = ceiling_share(table["pcc"].to_numpy(), table["ceiling"].to_numpy())
            notes.append(f"{share:.0%} of the noise ceiling\n({n_reliable} genes with ceiling ≥ {RELIABLE})")
        if noisy.any():
            notes.append(f"gray: ceiling too noisy\nto estimate ({noisy.sum()} genes)")
        axes.text(0.03, 0.98, "\n".join(notes), transform=axes.transAxes, va="top")
        axes.set(
            xlim=(-0.02, reach),
            ylim=(min(-0.02, table["pcc"].min() * 1.1 if len(table) else 0), reach),
            xlabel="noise ceiling (PCC)",
            ylabel="PCC of log1p(UMI)",
        )
        save(figure, out)


def ceiling_check(tables: Mapping[str, pd.DataFrame], out: Path | Sequence[Path]) -> None:
    """Estimated noise ceilings against the PCC of the true rates of simulated sections, one panel per table.

    Parameters
    ----------
    tables
        By title: `mean_counts, ceiling` (estimated) and `reached` (PCC of the true rates), one row per gene. Genes with an unreliable
        ceiling (0) are drawn but not averaged.
    out
        One or more paths with the suffix .png, .pdf or .svg.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(tables) + 0.6, 2.8), layout="constrained")
        panels = figure.subplots(1, len(tables), squeeze=False, sharex=True, sharey=True)[0]
        counts = np.concatenate([table["mean_counts"].to_numpy() for table in tables.values()])
        norm = mpl.colors.LogNorm(max(float(np.percentile(counts, 1)), 1e-3), float(counts.max()))
        for axes, (title, table) in zip(panels, tables.items(), strict=True):
            axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            points = axes.scatter(
                table["reached"],
                table["ceiling"],
                c=table["mean_counts"],
                s=5,
                cmap=SEQUENTIAL,
                norm=norm,
                linewidths=0,
            )
            known = table[table["ceiling"] > 0]
            means = f"mean: {known['ceiling'].mean():.2f} estimated, {known['reached'].mean():.2f} reached"
            text = f"{means}\n({len(known)} genes)"
            axes.text(0.97, 0.03, text, transform=axes.transAxes, ha="right", va="bottom")
            axes.set(title=title, xlabel="PCC of the true rates", aspect="equal")
        panels[0].set_ylabel("estimated noise ceiling")
        add_colorbar(figure, points, panels, "mean UMI per nucleus")
        save(figure, out)


def training_figure(run: Path, folder: Path, *, best_epoch: int | None = None) -> None:
    """Draw the training curves of a run into `folder`, as PNG and PDF, if it kept any.

    Parameters
    ----------
    run
        Run folder; curves are read from csv/metrics.csv.
    folder
        Output folder.
    best_epoch
        Epoch whose weights were kept, to mark in every panel.
    """
    curves = run / "csv" / "metrics.csv"
    if curves.is_file():
        training_curves(curves, [folder / "training.png", folder / "training.pdf"], best_epoch=best_epoch)


def training_curves(metrics_csv: Path, out: Path | Sequence[Path], *, best_epoch: int | None = None) -> None:
    """Training curves: one panel per metric, with training, validation and the epoch whose weights were kept.

    Parameters
    ----------
    metrics_csv
        File of Lightning's CSV logger with `epoch` and columns `train/<metric>` and `val/<metric>`.
    out
        One or more paths with the suffix .png, .pdf or .svg.
    best_epoch
        Epoch to mark in every panel; None marks none.

    Raises
    ------
    InputError
        If the file has no such columns.
    """
    table = pd.read_csv(metrics_csv)
    matches = {column: re.fullmatch(r"(train|val)[/_](.+?)(?:_epoch)?", column) for column in table.columns}
    curves = {column: match.groups() for column, match in matches.items() if match and not column.endswith("_step")}
    figures = sorted({name for _, name in curves.values()}, key=lambda name: [*_TITLES, name].index(name))
    if not figures or "epoch" not in table:
        raise InputError(
            f"{metrics_csv}: has no columns epoch, train/... and val/...; expected metrics.csv of Lightning's CSV logger"
        )
    with mpl.rc_context(STYLE):
        columns = min(4, len(figures))
        rows = -(-len(figures) // columns)
        figure = Figure(figsize=(1.9 * columns, 1.8 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        epochs = table.groupby("epoch").mean(numeric_only=True)
        for axes, name in zip(panels, figures, strict=False):
            for column, (part, of) in curves.items():
                values = epochs[column].dropna() if of == name else pd.Series(dtype=float)
                if len(values):
                    colour, label = (BLUE, "training") if part == "train" else (ORANGE, "validation")
                    marker = "o" if len(values) == 1 else None
                    axes.plot(values.index, values, color=colour, label=label, linewidth=1, marker=marker, markersize=3)
            low, high = axes.dataLim.intervaly
            if low > 0 and high > 10 * low:  # else the first epoch would flatten the rest
                axes.set_yscale("log")
            if best_epoch is not None:
                label = f"best epoch ({best_epoch})"
                axes.axvline(best_epoch, color=GREY, linewidth=0.6, linestyle=":", label=label)
            axes.set(xlabel="epoch", title=_TITLES.get(name, name))
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].legend(frameon=False)
        for axes in panels[len(figures) :]:
            axes.set_visible(False)
        save(figure, out)


def _label_genes(axes: Axes, table: pd.DataFrame, reach: float, n_named: int) -> None:
    """Label the highest points on their left, unless a label would cover another point or label."""
    x, y = table["ceiling"].to_numpy(), table["pcc"].to_numpy()
    heights: list[float] = []
    for i in np.argsort(-y):
        in_the_way = (np.abs(y - y[i]) < 0.015 * reach) & (x < x[i]) & (x > x[i] - 0.17 * reach)
        if (
            len(heights) < n_named
            and not in_the_way.any()
            and all(abs(y[i] - other) > 0.03 * reach for other in heights)
        ):
            heights.append(y[i])
            axes.annotate(
                table["gene"].iloc[i],
                (x[i], y[i]),
                (-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=5,
                fontstyle="italic",
            )
