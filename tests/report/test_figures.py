import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from prts.errors import InputError
from prts.evaluation import ceiling
from prts.report import figures, figures_calibration, figures_maps
from prts.report.figures import ceiling_check, pcc_vs_ceiling, training_curves


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, for a look at what they hold."""
    kept, save = [], figures.save
    for module in (figures, figures_calibration, figures_maps):
        monkeypatch.setattr(module, "save", lambda figure, out: (kept.append(figure), save(figure, out))[1])
    return kept


def test_pcc_vs_ceiling(tmp_path, drawn, monkeypatch):
    per_gene = pd.DataFrame(
        {
            "gene": ["a", "b", "c", "d"],
            "mean_counts": [1.0, 0.2, 0.1, 0.0],
            "pcc": [0.4, 0.1, 0.2, np.nan],
            "ceiling": [0.8, 0.4, 0.0, np.nan],
        }
    )
    pcc_vs_ceiling(per_gene, tmp_path / "c.png", n_named=2)
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.8, 0.4], [0.4, 0.1]])
    np.testing.assert_allclose(axes.collections[1].get_offsets(), [[0, 0.2]])  # grey: its ceiling is not known
    texts = [t.get_text() for t in axes.texts]
    assert texts[:2] == ["a", "b"]
    assert texts[2].startswith("42% of the noise ceiling\n(2 genes")
    assert texts[2].endswith("gray: ceiling too noisy\nto estimate (1 genes)")
    monkeypatch.setattr(ceiling, "RELIABLE", 0.5)
    monkeypatch.setattr(figures, "RELIABLE", 0.5)
    pcc_vs_ceiling(per_gene, tmp_path / "c.png")  # as metrics.json has it, under its one threshold
    assert drawn[1].axes[0].texts[-1].get_text().startswith("50% of the noise ceiling\n(1 genes with ceiling ≥ 0.5)")
    pcc_vs_ceiling(per_gene[per_gene["gene"] == "d"], tmp_path / "none.png")  # an empty figure is allowed


def test_training_curves_from_lightnings_csv(tmp_path, drawn):
    rows = [
        {"epoch": 0, "step": 9, "train/loss": 4.0, "lr-AdamW": 0.1},
        {"epoch": 0, "step": 9, "val/loss": 3.0, "val/pcc": 0.1},
        {"epoch": 1, "step": 19, "train/loss": 2.0, "lr-AdamW": 0.1},
        {"epoch": 1, "step": 19, "val/loss": 2.5, "val/pcc": 0.2},
        {"epoch": 2, "step": 29, "train/loss": 1.0, "lr-AdamW": 0.1},
        {"epoch": 2, "step": 29, "val/loss": 2.7, "val/pcc": 0.25},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "metrics.csv", index=False)
    training_curves(tmp_path / "metrics.csv", tmp_path / "t.png", best_epoch=2)
    loss, pcc = drawn[0].axes
    assert (loss.get_title(), pcc.get_title()) == ("loss", "mean PCC over genes")
    lines = {line.get_label(): line for line in loss.lines}
    np.testing.assert_array_equal(lines["training"].get_xydata(), [[0, 4], [1, 2], [2, 1]])
    np.testing.assert_array_equal(lines["validation"].get_ydata(), [3, 2.5, 2.7])
    # the epoch that was kept (by PCC), not that of the smallest loss
    assert lines["best epoch (2)"].get_xdata()[0] == 2
    assert [line.get_label() for line in pcc.lines] == ["validation", "best epoch (2)"]
    np.testing.assert_array_equal(pcc.lines[0].get_xydata(), [[0, 0.1], [1, 0.2], [2, 0.25]])
    training_curves(tmp_path / "metrics.csv", tmp_path / "t.png")
    assert [len(axes.lines) for axes in drawn[1].axes] == [2, 1]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"other\.csv"):
        training_curves(tmp_path / "other.csv", tmp_path / "x.png")


@pytest.mark.slow
def test_pyplot_and_its_backend_are_left_alone():
    code = "import sys, prts.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_panel_of_estimated_against_reached_ceilings_a_table(tmp_path, drawn):
    table = pd.DataFrame({"mean_counts": [0.01, 0.5, 2.0], "ceiling": [0.0, 0.4, 0.8], "reached": [0.05, 0.3, 0.7]})
    ceiling_check({"drawn": table, "measured": table.iloc[1:]}, tmp_path / "check.png")
    left, right = drawn[0].axes[:2]
    assert (left.get_title(), right.get_title()) == ("drawn", "measured")
    np.testing.assert_allclose(left.collections[0].get_offsets(), table[["reached", "ceiling"]])
    # the suppressed gene has a point and no part in the means
    assert left.texts[0].get_text() == "mean: 0.60 estimated, 0.50 reached\n(2 genes)" == right.texts[0].get_text()
