"""Summarize a multirun: summary.csv, and summary.html, a self-contained page."""

from __future__ import annotations

import base64
import html
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prts.io.cache import atomic
from prts.report.jobs import OBJECTIVE, read_jobs

logger = logging.getLogger(__name__)

_MOST_BARS = 16
_ZERO = ("gene_mean", "permuted")  # baselines that score about 0 by design; in summary.csv only
_FIGURES = {
    "test/pcc_mean": "test PCC",
    "test/ceiling_share": "share of ceiling",
    "test/spot_pcc_mean": "spot PCC",
    "test/skill_mean": "skill",
    "test/auroc": "AUROC",
    "test/mcc": "MCC",
}
STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;color:#1a1a1a;background:#fff}
body{max-width:1250px;margin:2.5em auto;padding:0 1.5em}
h1{font-size:1.6em;margin:0 0 .1em}h2{font-size:1.15em;margin:2.2em 0 .4em;border-bottom:1px solid #ddd;padding-bottom:.2em}
p{margin:.4em 0}.quiet,figcaption{color:#555;font-size:.9em}figure{margin:1em 0}img{max-width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.87em;font-variant-numeric:tabular-nums}
th,td{padding:.3em .7em;text-align:left;border-bottom:1px solid #e6e6e6;white-space:nowrap}
th{white-space:normal;vertical-align:bottom;border-bottom:1.5px solid #888;font-weight:600}
td.n,th.n{text-align:right}tr.best td{background:#fff4e5;font-weight:600}td.reason{white-space:normal}
.cards{display:flex;flex-wrap:wrap;gap:1em}
.card{border:1px solid #ddd;border-left:4px solid #d55e00;border-radius:4px;padding:.7em 1.1em;flex:0 1 30em}
.card b{font-size:1.05em}code{font-size:.92em;background:#f4f4f4;padding:0 .25em;border-radius:3px}.failed{color:#b00020}
@media print{body{margin:0;max-width:none}}
"""


def summarise(folder: Path) -> pd.DataFrame:
    """Write summary.csv and summary.html of a multirun into its folder, replacing earlier ones.

    Parameters
    ----------
    folder
        Folder of the multirun.

    Returns
    -------
    One row per job (`prts.report.jobs.read_jobs`).

    Raises
    ------
    InputError
        If the folder contains no jobs.

    Examples
    --------
    >>> summarise("multirun/2026-11-22_09-30-00")  # doctest: +SKIP
    """
    folder = Path(folder)
    jobs, keys = read_jobs(folder)
    with atomic(folder / "summary.csv") as temporary:
        jobs.to_csv(temporary, index=False)
    with atomic(folder / "summary.html") as temporary:
        temporary.write_text(_page(folder.name, jobs, keys), encoding="utf-8")
    return jobs


def settings_of(jobs: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Group finished jobs by setting, and average over seeds.

    Parameters
    ----------
    jobs, keys
        Result of `read_jobs`.

    Returns
    -------
    The finished jobs with a column `setting` (what varies between jobs except tissue and seed); and one row per tissue and setting with
    the mean metrics, the number `n` of seeds and the names of the `jobs`, sorted by validation PCC within each tissue.
    """
    varying = [key for key in keys if jobs[key].nunique(dropna=False) > 1]
    records: list[Any] = jobs[varying].to_dict("records") if varying else []
    names = [_setting(row, varying) for row in records] or ["default"] * len(jobs)
    done = jobs.assign(setting=names)[jobs["status"] == "done"]
    figures = [column for column in jobs.select_dtypes("number") if "/" in str(column)]
    grouped = done.groupby(["tissue", "setting"], sort=False)
    names_of = grouped["job"].agg(", ".join).rename("jobs")
    means = pd.concat([grouped[figures].mean(), grouped.size().rename("n"), names_of], axis=1).reset_index()
    if OBJECTIVE not in means:
        means[OBJECTIVE] = math.nan
    order = means["tissue"].map({tissue: i for i, tissue in enumerate(dict.fromkeys(jobs["tissue"]))})
    ranked = means.assign(order=order).sort_values(["order", OBJECTIVE], ascending=[True, False], kind="stable")
    return done, ranked.drop(columns="order").reset_index(drop=True)


def best_by_validation(settings: pd.DataFrame) -> dict[str, str]:
    """Setting with the highest validation PCC (mean over seeds) of each tissue; test metrics are not used."""
    known = settings.dropna(subset=[OBJECTIVE])
    first = known.drop_duplicates("tissue")
    return dict(zip(first["tissue"], first["setting"], strict=True))


def _setting(row: dict[str, Any], varying: Sequence[str]) -> str:
    def value(key: str) -> str:
        text = "default" if pd.isna(row[key]) else str(row[key])
        try:
            return f"{float(text):.4g}"
        except ValueError:
            return text

    if len(varying) == 1:
        return value(varying[0])
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value(key)}" for key in varying)


def _page(name: str, jobs: pd.DataFrame, keys: Sequence[str]) -> str:
    done, settings = settings_of(jobs, keys)
    best = best_by_validation(settings)
    failed = jobs[jobs["status"] != "done"]
    count = f"{len(done)} of {len(jobs)} jobs done"
    if len(failed):
        count += f', <span class="failed">{len(failed)} did not finish</span> (see the end of the page)'
    constant = [f"{key}={jobs[key].iloc[0]}" for key in keys if jobs[key].nunique(dropna=False) == 1]
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Sweep {_text(name)}</title><style>{STYLE}</style></head><body>",
        f"<h1>Sweep {_text(name)}</h1><p>{count}. ",
        f"Shared settings: <code>{_text(' '.join(constant))}</code></p>" if constant else "</p>",
    ]
    if "warning/split" in done:
        parts += [f'<p class="failed">{_text(text)}</p>' for text in done["warning/split"].dropna().unique()]
    if len(done):
        parts += [_best(settings, best), _bar_figure(done, settings, best), _heat_figures(done, keys)]
        parts.append(_table(settings, best))
    parts += [_failed(failed), "</body></html>\n"]
    return "".join(parts)


def _best(settings: pd.DataFrame, best: dict[str, str]) -> str:
    cards = []
    for tissue, setting in best.items():
        row = settings[(settings["tissue"] == tissue) & (settings["setting"] == setting)].iloc[0]
        lines = [f"validation PCC {_number(row[OBJECTIVE])} ({_seeds(row['n'])})"]
        lines.append(
            f"test PCC {_interval(row, 'test/pcc_mean')}, noise ceiling {_number(row.get('test/ceiling_mean'))}"
        )
        others = [f"{label} {_number(row[key])}" for key, label in list(_FIGURES.items())[1:] if _known(row, key)]
        lines.append(", ".join(others))
        for baseline in _baselines(settings):
            difference = f"baseline/{baseline}/difference"
            if _known(row, difference):
                lines.append(f"difference to baseline {_text(baseline)}: {_interval(row, difference, signed=True)}")
        lines.append(f"job{'s' if row['n'] > 1 else ''} {_text(row['jobs'])}")
        cards.append(
            f'<div class="card"><b>★ {_text(tissue)}: {_text(setting)}</b><br>'
            + "<br>".join(filter(None, lines))
            + "</div>"
        )
    note = "Chosen by validation PCC alone; test metrics are shown for the chosen setting."
    return f'<h2>Best by validation</h2><p class="quiet">{note}</p><div class="cards">{"".join(cards)}</div>'


def _bar_figure(done: pd.DataFrame, settings: pd.DataFrame, best: dict[str, str]) -> str:
    from prts.report.sweep_figures import bars

    if "test/pcc_mean" not in settings:
        return ""
    shown = settings.groupby("tissue", sort=False).head(_MOST_BARS)
    if len(shown) == len(settings):  # all fit: keep the order in which they were requested
        place = {setting: i for i, setting in enumerate(dict.fromkeys(done["setting"]))}
        shown = shown.sort_values("setting", key=lambda names: names.map(place), kind="stable")
    table = shown.reindex(columns=["tissue", "setting", "test/pcc_mean", "test/pcc_mean_low", "test/pcc_mean_high"])
    table.columns = pd.Index(["tissue", "setting", "pcc", "low", "high"])
    tissues = list(dict.fromkeys(settings["tissue"]))
    table = pd.concat([table[table["tissue"] == tissue] for tissue in tissues])
    lines = {}
    for tissue in tissues:
        chosen = settings[(settings["tissue"] == tissue) & (settings["setting"] == best.get(tissue))]
        row = chosen.iloc[0] if len(chosen) else settings[settings["tissue"] == tissue].iloc[0]
        lines[tissue] = {b: float(row[f"baseline/{b}/pcc_mean"]) for b in _baselines(settings)}
        lines[tissue]["ceiling"] = float(row.get("test/ceiling_mean", math.nan))
    seeds = done[["tissue", "setting", "test/pcc_mean"]].rename(columns={"test/pcc_mean": "pcc"})
    few = "" if len(shown) == len(settings) else f" Only the {_MOST_BARS} best by validation are shown."
    caption = (
        "PCC of log1p(UMI), averaged over genes and seeds; error bars: mean 95% interval, over blocks of the test section, or over "
        f"test sections if there are several. ★ and dark blue: best by validation; baselines and noise ceiling are for this setting.{few}"
    )
    return _figure("Test PCC by setting", bars(table, seeds, lines, best), caption)


def _heat_figures(done: pd.DataFrame, keys: Sequence[str]) -> str:
    from prts.report.sweep_figures import heat_maps

    varying = [key for key in keys if done[key].nunique() > 1]
    sizes = [done[key].nunique() for key in varying]
    if len(varying) < 2 or OBJECTIVE not in done or done[OBJECTIVE].notna().sum() == 0:
        return ""
    figures = []
    for tissue, of_tissue in done.groupby("tissue", sort=False):
        means = of_tissue.groupby(varying, sort=False)[OBJECTIVE].mean().rename("value").reset_index()
        if len(means) < 0.5 * math.prod(sizes):  # not a grid but random samples, as with Optuna
            continue
        caption = (
            "Validation PCC, mean over seeds"
            if len(varying) == 2
            else "Validation PCC, mean over seeds; each cell shows the best over all values of the other parameters"
        )
        figures.append(_figure(f"Grid: {tissue}", heat_maps(means, varying, "validation PCC"), f"{caption}. ★: best."))
    return "".join(figures)


def _table(settings: pd.DataFrame, best: dict[str, str]) -> str:
    figures = {key: label for key, label in _FIGURES.items() if key in settings and settings[key].notna().any()}
    baselines = _baselines(settings)
    labels = ["validation PCC", *figures.values(), *baselines, "seconds"]
    head = "".join(f'<th class="n">{_text(label)}</th>' for label in labels)
    rows = []
    for row in settings.to_dict("records"):
        chosen = best.get(row["tissue"]) == row["setting"]
        cells = [_number(row[OBJECTIVE])]
        cells += [_interval(row, key) if key == "test/pcc_mean" else _number(row[key]) for key in figures]
        cells += [_number(row[f"baseline/{name}/pcc_mean"]) for name in baselines]
        seconds = row.get("seconds/train", math.nan)
        cells.append("" if seconds != seconds else f"{seconds:.0f}")
        words = [row["tissue"], ("★ " if chosen else "") + row["setting"], row["n"], row["jobs"]]
        line = "".join(f"<td>{_text(word)}</td>" for word in words) + "".join(
            f'<td class="n">{cell}</td>' for cell in cells
        )
        rows.append(f"<tr{' class=best' if chosen else ''}>{line}</tr>")
    first = "<th>tissue</th><th>setting</th><th>seeds</th><th>jobs</th>"
    note = "Sorted by validation PCC; means over seeds. Columns named after a baseline show its test PCC; seconds are training time."
    return (
        f'<h2>All settings</h2><p class="quiet">{note} All metrics of all jobs are in <code>summary.csv</code>.</p>'
        f'<div class="scroll"><table><thead><tr>{first}{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _failed(failed: pd.DataFrame) -> str:
    if failed.empty:
        return ""
    own = [column for column in failed.columns if column not in ("job", "status", "reason") and "/" not in column]
    rows = []
    for row in failed.to_dict("records"):
        overrides = " ".join(f"{key}={row[key]}" for key in own if not pd.isna(row[key]))
        words = "".join(f"<td>{_text(row[key])}</td>" for key in ("job", "status"))
        rows.append(
            f'<tr>{words}<td><code>{_text(overrides)}</code></td><td class="reason">{_text(row["reason"])}</td></tr>'
        )
    head = "<tr><th>job</th><th>status</th><th>overrides</th><th>reason</th></tr>"
    note = "See <code>error.txt</code> in the folder of a job for its traceback."
    return (
        f'<h2>Failed jobs</h2><p class="quiet">{note}</p>'
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _figure(title: str, svg: str, caption: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{_text(title)}" src="data:image/svg+xml;base64,{data}">'
    return f"<h2>{_text(title)}</h2><figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _baselines(table: pd.DataFrame) -> list[str]:
    names = [str(column).split("/") for column in table.columns]
    found = [parts[1] for parts in names if len(parts) == 3 and parts[0] == "baseline" and parts[2] == "pcc_mean"]
    return [name for name in found if name not in _ZERO]


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean over {n} seeds"


def _known(row: Any, key: str) -> bool:
    return key in row and not pd.isna(row[key])


def _interval(row: Any, key: str, *, signed: bool = False) -> str:
    text = _number(row[key], signed=signed)
    if not (_known(row, f"{key}_low") and _known(row, f"{key}_high")):
        return text
    low, high = (_number(row[f"{key}_{end}"], signed=signed) for end in ("low", "high"))
    return f"{text} [{low}, {high}]"


def _number(value: Any, *, signed: bool = False) -> str:
    return "" if value is None or pd.isna(value) else f"{value:{'+' if signed else ''}.3f}".replace("-", "\u2212")


def _text(value: Any) -> str:
    return html.escape(str(value))
