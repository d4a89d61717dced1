"""index.html of a run with several sections: a table of them with links to their pages."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from prts.evaluation.per_section import SECTIONS
from prts.io.cache import atomic
from prts.report.sweep import STYLE
from prts.report.text import number

INDEX = "index.html"
_COLUMNS = {
    "n_cells": "nuclei",
    "pcc_mean": "PCC",
    "ceiling_mean": "noise ceiling",
    "ceiling_share": "share of ceiling",
    "skill_mean": "skill",
    "auroc": "AUROC",
    "spot_pcc_mean": "spot PCC",
    "baseline/ridge/pcc_mean": "ridge",
    "baseline/ridge/difference": "difference to ridge",
    "registration/displacement_um": "bins off the nuclei, um",
}


def write_index(folder: Path, metrics: Mapping[str, Any]) -> Path | None:
    """Write index.html of a run with several test or validation sections, or with sections left out.

    Parameters
    ----------
    folder
        The run folder, with sections.csv and the pages of its test sections.
    metrics
        Content of metrics.json.

    Returns
    -------
    The page; None if there is one section of each role, whose page is report.html.
    """
    path = folder / SECTIONS
    if not path.is_file():
        return None
    table = pd.read_csv(path, converters={"section": str})
    skipped = {key.partition("/")[2]: str(value) for key, value in metrics.items() if key.startswith("skipped/")}
    scored = table["role"].value_counts().drop("train", errors="ignore")
    if not skipped and (scored <= 1).all():
        return None
    with atomic(folder / INDEX) as temporary:
        temporary.write_text(_page(folder, table, metrics, skipped), encoding="utf-8")
    return folder / INDEX


def _page(folder: Path, table: pd.DataFrame, metrics: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    shown = {key: label for key, label in _COLUMNS.items() if key in table and table[key].notna().any()}
    head = "".join(f'<th class="n">{html.escape(label)}</th>' for label in shown.values())
    tests = table.loc[table["role"] == "test", "section"].tolist()
    pages = {name: f"report{'' if i == 0 else f'-{name}'}.html" for i, name in enumerate(tests)}
    rows = []
    for role in ("test", "val", "train"):
        own = table[table["role"] == role]
        for row in own.to_dict("records"):
            page = pages.get(row["section"], "") if role == "test" else ""
            rows.append(_row(role, _link(folder, page, row["section"]), [_cell(key, row[key]) for key in shown]))
        if role != "train" and len(own) > 1:
            rows.append(_row(role, f"<b>mean of {len(own)} sections</b>", [_mean(metrics, role, key) for key in shown]))
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Sections of {html.escape(folder.name)}</title><style>{STYLE}</style></head><body>",
        f"<h1>Sections of {html.escape(folder.name)}</h1>",
        f'<p class="quiet">All figures are in <code>{SECTIONS}</code>. ',
        "In brackets: 95% interval of the mean over sections, by Student's t, for three sections or more.</p>",
        f'<div class="scroll"><table><thead><tr><th>role</th><th>section</th>{head}</tr></thead>',
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    ]
    if skipped:
        lines = "".join(
            f'<tr><td>{html.escape(name)}</td><td class="reason">{html.escape(reason)}</td></tr>'
            for name, reason in skipped.items()
        )
        parts.append(f"<h2>Left out</h2><table><thead><tr><th>section</th><th>reason</th></tr></thead>{lines}</table>")
    return "".join([*parts, "</body></html>\n"])


def _row(role: str, section: str, cells: list[str]) -> str:
    figures = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f"<tr><td>{role}</td><td>{section}</td>{figures}</tr>"


def _link(folder: Path, page: str, section: str) -> str:
    text = html.escape(section)
    return f'<a href="{html.escape(page)}">{text}</a>' if page and (folder / page).is_file() else text


def _cell(key: str, value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{int(value):,}" if key == "n_cells" else number(value)


def _mean(metrics: Mapping[str, Any], role: str, key: str) -> str:
    """The mean over sections, with its interval, from the metrics of the run."""
    name = key if key.startswith("baseline/") and role == "test" else f"{role}/{key}"
    value = metrics.get(name)
    if key == "n_cells" or value is None:
        return ""
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    return number(value) + (f" [{number(low)}, {number(high)}]" if low is not None and high is not None else "")
