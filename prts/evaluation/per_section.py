"""The figures of each section, sections.csv, and what metrics.json keeps of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

# Of these, metrics.json has the value of each section, too; of all others, the mean over sections.
KEPT = frozenset(
    "pcc_mean pcc_median spearman_mean rmse_mean skill_mean ceiling_mean ceiling_share accuracy majority_accuracy balanced_accuracy "
    "mcc auroc auprc n_cells n_genes n_constant_genes spot_pcc_mean".split()
)
SECTIONS = "sections.csv"
_SCORED = ("val", "test")


def section_table(metrics: Mapping[str, Any], roles: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """All figures of each section.

    Parameters
    ----------
    metrics
        Metrics of a run: `<role>/<section>/<figure>` and `baseline/<section>/<name>/<figure>`, without the section if it is the only one
        of its role; and `registration/<section>/<figure>`.
    roles
        The sections of train, val and test.

    Returns
    -------
    One row per section and role: `role`, `section`, and the figures. Baselines are those of the test sections.
    """
    rows = []
    for role, names in roles.items():
        for name in names:
            row: dict[str, Any] = {"role": role, "section": name}
            if role in _SCORED:
                row |= _own(metrics, role, name, alone=len(names) == 1)
            if role == "test":
                baselines = _own(metrics, "baseline", name, alone=len(names) == 1)
                row |= {f"baseline/{key}": value for key, value in baselines.items()}
            registration = f"registration/{name}/"
            row |= {key: value for key, value in metrics.items() if key.startswith(registration)}
            rows.append({key.replace(registration, "registration/"): value for key, value in row.items()})
    table = pd.DataFrame(rows)
    last = [column for column in table if str(column).startswith("registration/")]
    return table[[*table.columns.drop(last), *last]]


def without_sections(metrics: Mapping[str, Any], roles: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The metrics for metrics.json: of each section, only `KEPT`, the displacement of its counts and its stripe index.

    Parameters
    ----------
    metrics, roles
        As for `section_table`.
    """
    names = {name for sections in roles.values() for name in sections}
    several = any(len(sections) > 1 for sections in roles.values())

    def is_kept(key: str) -> bool:
        first, _, rest = key.partition("/")
        section, _, figure = rest.partition("/")
        if not figure or section not in names or len(roles.get("test" if first == "baseline" else first, ())) == 1:
            return True
        if first == "stripes":
            return True
        if first == "registration":
            return not several or figure == "displacement_um"
        return first in _SCORED and figure in KEPT

    return {key: value for key, value in metrics.items() if is_kept(key)}


def with_sections(metrics: Mapping[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """The inverse of `without_sections`, for the pages of a run.

    Parameters
    ----------
    metrics
        Content of metrics.json.
    table
        Content of sections.csv.
    """
    merged = dict(metrics)
    several = table["role"].value_counts()
    for row in table.to_dict("records"):
        role, section = row["role"], row["section"]
        for key, value in row.items():
            first, _, rest = str(key).partition("/")
            if (
                role not in _SCORED
                or several[role] == 1
                or first in ("role", "section", "registration")
                or pd.isna(value)
            ):
                continue
            merged[f"baseline/{section}/{rest}" if first == "baseline" else f"{role}/{section}/{key}"] = value
    return merged


def _own(metrics: Mapping[str, Any], first: str, section: str, *, alone: bool) -> dict[str, Any]:
    prefix = f"{first}/" if alone else f"{first}/{section}/"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
