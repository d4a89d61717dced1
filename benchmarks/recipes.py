"""One table of the settings of one or more multiruns, for each tissue: `python benchmarks/recipes.py multirun/a multirun/b ...`.

Test figures are means over the seeds; in brackets the mean of the seeds' block-bootstrap 95 % intervals. The second table is the advantage
of the default (else of the best setting by validation) over each baseline, at nuclei and, where there are measured spots, at spots.
"""

import sys
from pathlib import Path

import pandas as pd

from prts.report.jobs import OBJECTIVE, read_jobs

COLUMNS = {
    OBJECTIVE: "validation PCC",
    "test/pcc_mean": "mean PCC",
    "test/pcc_median": "median",
    "test/spot_pcc_mean": "spots",
    "test/skill_mean": "skill",
    "test/auroc": "AUROC",
    "test/mcc": "MCC",
    "test/ceiling_share": "share of ceiling",
}


def number(value: float, signed: bool = False) -> str:
    return "" if pd.isna(value) else f"{value:{'+' if signed else ''}.3f}".replace("0.", ".", 1)


def interval(row: pd.Series, key: str, signed: bool = False) -> str:
    text = number(row.get(key, float("nan")), signed)
    low, high = (row.get(f"{key}_{end}", float("nan")) for end in ("low", "high"))
    return text if pd.isna(low) or pd.isna(high) else f"{text} ({number(low, signed)} to {number(high, signed)})"


def setting(row: pd.Series, keys: list[str]) -> str:
    words = [f"{key.rsplit('.', 1)[-1]}={row[key]}" for key in keys if not pd.isna(row[key])]
    return " ".join(word for word in words if word != "ablation=full") or "default"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("benchmarks/recipes.py: give the folder of one or more multiruns")
    tables = [read_jobs(Path(folder)) for folder in sys.argv[1:]]
    jobs = pd.concat([table.dropna(axis="columns", how="all") for table, _ in tables], ignore_index=True)
    keys = list(dict.fromkeys(key for _, own in tables for key in own))
    jobs["setting"] = jobs.apply(setting, axis=1, keys=keys)
    done = jobs[jobs["status"] == "done"]
    for tissue, of_tissue in done.groupby("tissue", sort=False):
        grouped = of_tissue.groupby("setting", sort=False)
        means = grouped.mean(numeric_only=True).assign(seeds=grouped["seed"].nunique())
        shown = {key: label for key, label in COLUMNS.items() if key in means and means[key].notna().any()}
        print(f"\n**{tissue}** (noise ceiling {number(means['test/ceiling_mean'].iloc[0])})\n")
        print(f"| setting | seeds | {' | '.join(shown.values())} |\n|{'---|' * (len(shown) + 2)}")
        for name, row in means.sort_values(OBJECTIVE, ascending=False).iterrows():
            print(f"| {name} | {int(row['seeds'])} | {' | '.join(interval(row, key) for key in shown)} |")
        best = means.loc["default" if "default" in means.index else means[OBJECTIVE].idxmax()]
        print(
            f"\n{best.name} minus each baseline:\n\n| baseline | its PCC | nuclei | its spot PCC | spots |\n|---|---|---|---|---|"
        )
        names = [key.split("/")[1] for key in means if key.startswith("baseline/") and key.endswith("/pcc_mean")]
        for name in names:
            at = f"baseline/{name}"
            cells = [number(best[f"{at}/pcc_mean"]), interval(best, f"{at}/difference", signed=True)]
            cells += [number(best.get(f"{at}/spot_pcc_mean", float("nan")))]
            cells += [interval(best, f"{at}/spot_difference", signed=True)]
            print(f"| {name} | {' | '.join(cells)} |")
    failed = jobs[jobs["status"] != "done"]
    for row in failed.to_dict("records"):
        print(
            f"\nnot in the table: {row['tissue']} {row['setting']} seed {row['seed']}: {row['status']}: {row['reason']}"
        )


if __name__ == "__main__":
    main()
