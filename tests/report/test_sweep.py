"""The summary of a multirun, from folders as the jobs leave them."""

import base64
import csv
import itertools
import json
import re

import pytest
import yaml

from prts.errors import InputError
from prts.report import sweep_figures
from prts.report.jobs import read_jobs
from prts.report.sweep import best_by_validation, settings_of, summarise


def job(sweep, number, overrides, *, tissue="demo", seed=0, metrics=None, error=None):
    """A job's folder: `metrics` of a job that is done, `error` as the first line of its error.txt, neither where it was stopped."""
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    lines = [f"{key}={value}" for key, value in overrides.items()]
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(lines))
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"tissue": {"name": tissue}, "seed": seed}))
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": {"job": {"num": number}}}))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if error is not None:
        (folder / "error.txt").write_text(f"{error}\n\nTraceback ...\n")


def figures(val, test):
    return {
        "val/pcc_mean": val,
        "test/pcc_mean": test,
        "test/pcc_mean_low": test - 0.02,
        "test/pcc_mean_high": test + 0.03,
        "test/ceiling_mean": 0.5,
        "baseline/ridge/pcc_mean": 0.2,
        "baseline/ridge/difference": test - 0.2,
        "baseline/gene_mean/pcc_mean": 0.0,
    }


def page_of(sweep):
    summarise(sweep)
    return (sweep / "summary.html").read_text(encoding="utf-8")


def drawn(page):
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]


def test_every_job_has_a_row_and_failed_ones_their_reason(tmp_path):
    # by number, not by name: 10 comes after 9
    job(tmp_path, 0, {"ablation": "full", "seed": 1}, seed=1, metrics=figures(0.3, 0.2))
    job(tmp_path, 10, {"ablation": "full", "seed": 2}, seed=2)
    job(tmp_path, 9, {"ablation": "local_only", "seed": 1}, seed=1, error="wrong input: loss.w_0: is negative")
    job(tmp_path, 2, {"ablation": "local_only", "seed": 2}, seed=2, error="killed: by SIGKILL")
    summarise(tmp_path)
    with (tmp_path / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["job"], row["status"], row["reason"]) for row in rows] == [
        ("0", "done", ""),
        ("2", "killed", "by SIGKILL"),
        ("9", "wrong input", "loss.w_0: is negative"),
        ("10", "unfinished", "stopped before the end"),
    ]
    assert [row["ablation"] for row in rows] == ["full", "local_only", "local_only", "full"]
    assert rows[0]["test/pcc_mean"] == "0.2" and rows[1]["test/pcc_mean"] == ""
    assert [row["seed"] for row in rows] == ["1", "2", "1", "2"]


def test_a_job_that_failed_after_its_metrics_is_not_done(tmp_path):
    job(tmp_path, 0, {"logger": "wandb"}, metrics=figures(0.3, 0.2), error="failed: OSError: disk full")
    job(tmp_path, 1, {"logger": "csv"}, metrics=figures(0.2, 0.2))
    jobs, keys = read_jobs(tmp_path)
    assert jobs[["status", "reason"]].values.tolist() == [["failed", "OSError: disk full"], ["done", ""]]
    assert best_by_validation(settings_of(jobs, keys)[1]) == {"demo": "csv"}


def test_the_best_is_chosen_by_validation_over_seeds_never_by_test(tmp_path):
    # b has the best single seed on validation, and the best test; a has the best mean on validation
    for number, (name, seed, val, test) in enumerate(
        [("a", 1, 0.30, 0.10), ("a", 2, 0.30, 0.12), ("b", 1, 0.35, 0.40), ("b", 2, 0.21, 0.40)]
    ):
        job(tmp_path, number, {"ablation": name}, seed=seed, metrics=figures(val, test))
    jobs, keys = read_jobs(tmp_path)
    _, settings = settings_of(jobs, keys)
    assert best_by_validation(settings) == {"demo": "a"}
    assert settings["test/pcc_mean"].tolist() == pytest.approx([0.11, 0.40])
    page = page_of(tmp_path)
    assert "★ demo: a" in page
    # the test figures of the chosen setting, not of the one best at test
    assert "test PCC 0.110 [0.090, 0.140]" in page


def test_tissues_are_never_mixed(tmp_path):
    for number, (tissue, name, val) in enumerate(
        [("demo", "a", 0.5), ("demo", "b", 0.4), ("lung", "a", 0.1), ("lung", "b", 0.2)]
    ):
        job(tmp_path, number, {"tissue": tissue, "ablation": name}, tissue=tissue, metrics=figures(val, val))
    jobs, keys = read_jobs(tmp_path)
    assert keys == ["ablation"]
    assert best_by_validation(settings_of(jobs, keys)[1]) == {"demo": "a", "lung": "b"}


def test_the_page_asks_nobody_for_anything(tmp_path):
    for number, (w, alpha) in enumerate(itertools.product((0.5, 1), (2, 5, 10))):
        job(tmp_path, number, {"loss.w_0": w, "loss.alpha_w": alpha}, metrics=figures(0.1 * alpha**0.1 + w / 10, 0.2))
    page = page_of(tmp_path)
    assert not re.search(r"(?:https?:)?//|@import|<script|<link|url\(", page)
    pictures = drawn(page)
    assert len(pictures) == 2  # bars and heat map
    for picture in pictures:
        # names of XML, which nothing fetches; no reference leaves the picture
        assert not re.search(r'(?:href|src)="(?!#|data:)', picture)


def test_what_users_typed_is_text_on_the_page(tmp_path):
    evil = "<script>alert(1)</script>&\"'$x^{$"
    job(tmp_path, 0, {"ablation": evil}, metrics=figures(0.3, 0.2))
    job(tmp_path, 1, {"ablation": "b"}, tissue="<b>t</b>", metrics=figures(0.2, 0.2))
    job(tmp_path, 2, {"ablation": "c"}, error=f"failed: {evil}")
    page = page_of(tmp_path)
    assert "<script" not in page and "<b>t" not in page
    assert page.count("&lt;script&gt;") >= 2


def test_a_grid_of_four_parameters_has_a_map_for_each_pair(tmp_path):
    keys = ("loss.w_0", "loss.alpha_w", "loss.lambda_1", "loss.lambda_2")
    for number, values in enumerate(itertools.product((0.5, 1), (2, 5, 10), (1, 3), (5, 20, 80))):
        job(tmp_path, number, dict(zip(keys, values, strict=True)), metrics=figures(0.2 + number / 1000, 0.2))
    page = page_of(tmp_path)
    assert "Grid: demo" in page and "the best over all values of the other parameters" in page
    # 36 settings do not fit: the best by validation are drawn
    assert "Only the 16 best by validation are shown" in page
    assert "★ w_0=1 alpha_w=10 lambda_1=3 lambda_2=80" in page


def test_a_random_search_has_no_grid(tmp_path):
    for number in range(6):
        job(tmp_path, number, {"lr": 0.01 * (number + 1.1), "decay": 0.1 / (number + 1)}, metrics=figures(0.2, 0.2))
    assert "Grid" not in page_of(tmp_path)


def test_a_sweep_of_which_nothing_ended_well_still_has_a_page(tmp_path):
    job(tmp_path, 0, {"seed": 1}, error="failed: ValueError: no")
    page = page_of(tmp_path)
    assert "0 of 1 jobs done" in page and "ValueError: no" in page


def test_metrics_that_are_missing_leave_gaps(tmp_path):
    job(tmp_path, 0, {"ablation": "a"}, metrics={"val/pcc_mean": None, "test/pcc_mean": 0.1})
    job(
        tmp_path,
        1,
        {"ablation": "b"},
        metrics={"val/pcc_mean": 0.1, "test/pcc_mean": None, "warning/split": "neighbours <leak>"},
    )
    page = page_of(tmp_path)
    assert "★ demo: b" in page and "neighbours &lt;leak&gt;" in page


def test_a_mean_over_test_sections_has_no_interval(tmp_path, monkeypatch):
    kept, save = [], sweep_figures._svg
    monkeypatch.setattr(sweep_figures, "_svg", lambda figure: (kept.append(figure), save(figure))[1])
    ends = ("test/pcc_mean_low", "test/pcc_mean_high")
    without = {key: value for key, value in figures(0.4, 0.3).items() if key not in ends}
    job(tmp_path, 0, {"ablation": "a"}, tissue="two", metrics=without)
    job(tmp_path, 1, {"ablation": "a"}, tissue="one", metrics=figures(0.3, 0.2))
    assert "test PCC 0.300, noise ceiling" in page_of(tmp_path)
    two, one = kept[0].axes
    assert "95% interval" not in two.get_legend_handles_labels()[1]
    assert "95% interval" in one.get_legend_handles_labels()[1]


def test_a_folder_without_jobs_is_named(tmp_path):
    with pytest.raises(InputError, match="has no jobs"):
        summarise(tmp_path)
