"""Combine the scores of several sections into the content of metrics.json and per_gene.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

# Figures whose mean over sections gets an interval, and the fewest sections for which one says anything.
_WITH_INTERVAL = (
    "pcc_mean",
    "lognorm_pcc_mean",
    "spot_pcc_mean",
    "skill_mean",
    "auroc",
    "ceiling_share",
    "difference",
    "spot_difference",
)
_FEWEST = 3


def unpooled_mean(sections: Mapping[str, Mapping[str, float]], prefix: str) -> dict[str, float]:
    """`<prefix>/<figure>` of one section, or of several `<prefix>/<section>/<figure>` and their mean; never pooled over sections.

    The interval of a section, `<figure>_low` and `<figure>_high`, is not averaged: the mean of bounds is not a bound for the mean. Of three
    sections or more, the main figures get the 95% interval of their mean over sections under these names.
    """
    merged: dict[str, float] = {}
    if len(sections) > 1:
        for section, summary in sections.items():
            merged |= {f"{prefix}/{section}/{key}": value for key, value in summary.items()}
    keys: list[str] = list(dict.fromkeys(key for summary in sections.values() for key in summary))
    if len(sections) > 1:
        keys = [key for key in keys if not key.endswith(("_low", "_high"))]
    for key in keys:
        values = [summary[key] for summary in sections.values() if key in summary and math.isfinite(summary[key])]
        merged[f"{prefix}/{key}"] = float(np.mean(values)) if values else math.nan
        if len(sections) > 1 and len(values) >= _FEWEST and key.rpartition("/")[2] in _WITH_INTERVAL:
            low, high = mean_interval(values)
            merged |= {f"{prefix}/{key}_low": low, f"{prefix}/{key}_high": high}
    for key in ("n_cells", "n_genes", "n_constant_genes", "n_predictable"):
        if key in keys:
            values = [int(summary[key]) for summary in sections.values()]
            merged[f"{prefix}/{key}"] = sum(values) if key == "n_cells" else max(values)
    return merged


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of a few independent values, by Student's t.

    Examples
    --------
    >>> low, high = mean_interval([0.1, 0.2, 0.3])
    >>> f"{low:.3f} {high:.3f}"
    '-0.048 0.448'
    """
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    mean = float(np.mean(values))
    return mean - half, mean + half


def mean_per_gene(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The per-gene table of one section, or the unpooled mean of several (a gene is constant if it is constant in all)."""
    if len(tables) == 1:
        return tables[0]
    stacked = pd.concat(tables)
    mean = stacked.drop(columns="constant").groupby("gene", sort=False).mean()
    mean["constant"] = stacked.groupby("gene", sort=False)["constant"].all()
    return mean.reset_index()[list(tables[0].columns)]


def json_ready(metrics: Mapping[str, float | str]) -> dict[str, float | str | None]:
    """Metrics for JSON: sorted, with NaN as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in sorted(metrics.items())
    }
