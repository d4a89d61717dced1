"""Figures by section: sections.csv, metrics.json and index.html."""

import pandas as pd

from prts.evaluation.per_section import SECTIONS, section_table, with_sections, without_sections
from prts.report.run_index import write_index
from prts.report.text import section_metrics

ROLES = {"train": ["a"], "val": ["b"], "test": ["c", "d <x>"]}
METRICS = {
    "val/pcc_mean": 0.3,
    "val/moran_agreement": 0.9,
    "test/pcc_mean": 0.2,
    "test/moran_agreement": 0.8,
    "test/c/pcc_mean": 0.1,
    "test/c/moran_agreement": 0.7,
    "test/d <x>/pcc_mean": 0.3,
    "baseline/ridge/pcc_mean": 0.15,
    "baseline/c/ridge/pcc_mean": 0.12,
    "registration/a/displacement_um": 0.5,
    "stripes/a/before": 0.2,
    "registration/a/confidence": 9.0,
}


def test_each_section_has_a_row_with_all_its_figures():
    table = section_table(METRICS, ROLES).set_index(["role", "section"])
    assert table.index.tolist() == [("train", "a"), ("val", "b"), ("test", "c"), ("test", "d <x>")]
    assert table.loc[("val", "b"), ["pcc_mean", "moran_agreement"]].tolist() == [0.3, 0.9]
    assert table.loc[("test", "c"), ["moran_agreement", "baseline/ridge/pcc_mean"]].tolist() == [0.7, 0.12]
    assert table.loc[("train", "a"), "registration/confidence"] == 9.0
    assert pd.isna(table.loc[("test", "d <x>"), "baseline/ridge/pcc_mean"])


def test_metrics_keep_the_contract_and_the_pages_get_the_rest_back():
    flat = without_sections(METRICS, ROLES)
    assert METRICS.keys() - flat.keys() == {
        "test/c/moran_agreement",
        "baseline/c/ridge/pcc_mean",
        "registration/a/confidence",
    }
    whole = with_sections(flat, section_table(METRICS, ROLES))
    assert {key: value for key, value in whole.items() if not key.startswith("registration/")} == {
        key: value for key, value in METRICS.items() if not key.startswith("registration/")
    }
    assert section_metrics(whole, "c") == section_metrics(METRICS, "c")


def test_the_index_links_the_pages_of_the_sections(tmp_path):
    (tmp_path / "report.html").touch()
    section_table(METRICS, ROLES).to_csv(tmp_path / SECTIONS, index=False)
    page = write_index(tmp_path, {**METRICS, "skipped/f": "f.tif: is <cut>"})
    text = page.read_text()
    assert '<a href="report.html">c</a>' in text
    assert "d &lt;x&gt;" in text and "<x>" not in text  # and no link: its page is not there
    assert "f.tif: is &lt;cut&gt;" in text
    assert "mean of 2 sections" in text

    one = {**ROLES, "test": ["c"]}
    section_table({"test/pcc_mean": 0.2}, one).to_csv(tmp_path / SECTIONS, index=False)
    assert write_index(tmp_path, {}) is None
