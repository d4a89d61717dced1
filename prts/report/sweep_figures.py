"""Figures of a sweep as SVG text: bars with intervals per tissue, and heat maps of a grid."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from prts.report.figures_canvas import BLUE, ORANGE, add_colorbar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = {"ridge": "#d55e00", "colour": "#009e73", "context": "#56b4e9", "morphology": "#cc79a7", "position": "#e69f00"}
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "prts",
    "text.parse_math": False,  # overrides may contain $
}


def bars(
    settings: pd.DataFrame, seeds: pd.DataFrame, lines: Mapping[str, Mapping[str, float]], best: Mapping[str, str]
) -> str:
    """Test PCC of each setting, one panel per tissue: bars with intervals, seeds as dots, baselines and noise ceiling as lines.

    Parameters
    ----------
    settings
        `tissue, setting, pcc, low, high`: one row per bar, in the order to draw.
    seeds
        `tissue, setting, pcc`: one row per job.
    lines
        Heights of named lines by tissue; `ceiling` is dashed.
    best
        Setting that was chosen by validation, by tissue.
    """
    tissues = list(settings["tissue"].unique())
    counts = [int((settings["tissue"] == tissue).sum()) for tissue in tissues]
    with mpl.rc_context(_STYLE):
        ratios = [0.4 * n + 0.3 for n in counts]
        widen = max(1.0, 4.5 / sum(ratios))  # a minimum width for few bars
        figure = Figure(figsize=(widen * sum(ratios) + 1.9, 3.6), layout="constrained")
        panels = figure.subplots(1, len(tissues), sharey=True, squeeze=False, width_ratios=ratios)[0]
        for axes, tissue in zip(panels, tissues, strict=True):
            of_tissue = settings[settings["tissue"] == tissue].reset_index(drop=True)
            _bars_of_a_tissue(axes, of_tissue, seeds[seeds["tissue"] == tissue], best.get(tissue))
            for name, height in sorted(lines[tissue].items(), key=lambda line: -line[1]):
                if np.isfinite(height):
                    ceiling = name == "ceiling"
                    axes.axhline(
                        height,
                        color="black" if ceiling else _LINES.get(name, "#56b4e9"),
                        linewidth=0.9,
                        linestyle="--" if ceiling else "-",
                        label="noise ceiling" if ceiling else f"{name} (baseline)",
                        zorder=0.5,
                    )
            axes.set_title(tissue)
        panels[0].set_ylabel("test PCC, mean over genes")
        labels: dict[str, Any] = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                labels.setdefault(label, handle)
        figure.legend(list(labels.values()), list(labels), loc="outside right upper", frameon=False, fontsize=7)
        return _svg(figure)


def _bars_of_a_tissue(axes: Axes, settings: pd.DataFrame, seeds: pd.DataFrame, best: str | None) -> None:
    x = np.arange(len(settings))
    height = settings["pcc"].to_numpy(dtype=float)
    error = np.abs(settings[["low", "high"]].to_numpy(dtype=float).T - height)
    chosen = (settings["setting"] == best).to_numpy()
    axes.axhline(0, color="black", linewidth=0.6)
    axes.bar(x, height, width=0.62, color=np.where(chosen, BLUE, "#b8cfe0"), zorder=1)
    known = np.isfinite(error).all(axis=0)  # means over several test sections have no interval
    if known.any():
        axes.errorbar(
            x[known],
            height[known],
            error[:, known],
            fmt="none",
            ecolor="black",
            elinewidth=0.8,
            capsize=2,
            zorder=3,
            label="95% interval",
        )
    place = dict(zip(settings["setting"], x, strict=True))
    for setting, group in seeds.groupby("setting"):
        if setting in place and len(group) > 1:
            spread = place[setting] + np.linspace(-0.16, 0.16, len(group))
            axes.scatter(
                spread,
                group["pcc"],
                s=9,
                facecolor="white",
                edgecolor="black",
                linewidth=0.6,
                zorder=4,
                label="single seed",
            )
    for i in np.flatnonzero(chosen):
        top = max(height[i], settings["high"].fillna(-1).iloc[i])
        axes.annotate(
            "★", (i, top), (0, 3), textcoords="offset points", ha="center", color=ORANGE, fontfamily="DejaVu Sans"
        )
    labels = [_values_alone(setting) for setting in settings["setting"]]
    keys = {keys for keys, _ in labels}
    if len(keys) == 1 and (common := keys.pop()):  # named once below instead of at each bar
        axes.set_xlabel(common)
        names = [values for _, values in labels]
    else:
        names = list(settings["setting"])
    axes.set_xticks(x, names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(x) - 0.4)
    axes.margins(y=0.1)


def _values_alone(setting: str) -> tuple[str, str]:
    """Split `a=1 b=2` into `a / b` and `1 / 2`; settings of a single parameter are just a value."""
    parts = [part.partition("=") for part in setting.split(" ")]
    if not all(equals for _, equals, _ in parts):
        return "", setting
    return " / ".join(key for key, _, _ in parts), " / ".join(value for _, _, value in parts)


def heat_maps(values: pd.DataFrame, keys: Sequence[str], figure_of: str) -> str:
    """One heat map per pair of parameters, with the best value over all settings of the others.

    Parameters
    ----------
    values
        One row per setting: the parameters `keys` as strings, and `value`.
    keys
        Two or more parameters.
    figure_of
        Name of the value, for the color bar.
    """
    pairs = list(itertools.combinations(keys, 2))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    limits = float(values["value"].min()), float(values["value"].max())
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(2.7 * columns + 0.9, 2.3 * rows + 0.2), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (down, across) in zip(panels, pairs, strict=False):
            grid = values.pivot_table(index=down, columns=across, values="value", aggfunc="max")
            grid = grid.loc[_ordered(grid.index), _ordered(grid.columns)]
            picture = axes.imshow(grid, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
            for (row, column), value in np.ndenumerate(grid.to_numpy(dtype=float)):
                if np.isfinite(value):
                    dark = value < limits[0] + 0.6 * (limits[1] - limits[0])
                    best = "★ " if value == limits[1] else ""
                    colour = "white" if dark else "black"
                    axes.text(column, row, f"{best}{value:.3f}", ha="center", va="center", color=colour, fontsize=7)
            axes.set_xticks(range(grid.shape[1]), grid.columns)
            axes.set_yticks(range(grid.shape[0]), grid.index)
            axes.set(xlabel=across, ylabel=down)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        add_colorbar(figure, picture, panels.tolist(), figure_of, shrink=0.7, aspect=24)
        return _svg(figure)


def _ordered(labels: pd.Index) -> list[str]:
    """Sort numbers by value; keep the order of words."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return list(labels)


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
