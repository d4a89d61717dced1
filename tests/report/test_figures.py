import contextlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from PIL import Image

from prts.errors import InputError
from prts.metrics import ceiling
from prts.report import figures
from prts.report.figures import ceiling_check, gene_maps, pcc_vs_ceiling, training_curves
from prts.report.run import run_figures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, for a look at what they hold."""
    kept, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, out: (kept.append(figure), save(figure, out))[1])
    return kept


@pytest.fixture
def section():
    rng = np.random.default_rng(0)
    measured = rng.poisson(1.5, size=(400, 2)).astype(float)
    measured[:, 1] = 0
    return {
        "image": rng.integers(0, 255, (60, 100, 3), dtype=np.uint8),
        "image_width_px": 4000,
        "mpp": 0.5,
        "genes": ["Plp1", "Ttr"],
        "xy_px": rng.random((400, 2)) * [3600, 2000] + [200, 300],
        "measured": measured,
        "predicted": measured * 0.4 + rng.random((400, 2)) * 0.2,
        "pcc": [0.421, np.nan],
    }


def test_measured_and_predicted_share_place_and_colours(tmp_path, drawn, section):
    gene_maps(tmp_path / "new" / "maps.png", **section)
    panels = np.array(drawn[0].axes[:6]).reshape(2, 3)
    assert [a.get_title() for a in panels[0]] == ["H&E", "Measured", "Predicted"]
    assert [a.get_ylabel() for a in panels[:, 0]] == ["Plp1", "Ttr"]
    for row, values in ((0, section["measured"]), (1, section["predicted"])):
        top = np.percentile(
            values[:, row], 99
        )  # the second gene was not measured at all: its prediction sets the range
        for axes, shown in zip(panels[row, 1:], (section["measured"], section["predicted"]), strict=True):
            points = axes.collections[0]
            assert points.get_clim() == pytest.approx((0, top))
            np.testing.assert_array_equal(points.get_offsets(), section["xy_px"])
            np.testing.assert_array_equal(points.get_array(), shown[:, row])
            assert points.get_rasterized()
    assert [t.get_text() for t in panels[0, 2].texts] == ["PCC 0.42"]
    assert not panels[1, 2].texts
    bars = [a for a in drawn[0].axes[6:] if a.get_ylabel()]
    assert [a.get_ylabel() for a in bars] == ["log1p(UMI),\n0 to 99th percentile"] * 2


def test_all_panels_show_the_same_piece_of_tissue_with_y_down(tmp_path, drawn, section):
    gene_maps(tmp_path / "maps.png", **section)
    for axes in drawn[0].axes[:6]:
        assert axes.get_aspect() == 1
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert left < section["xy_px"][:, 0].min() < section["xy_px"][:, 0].max() < right
        assert top < section["xy_px"][:, 1].min() < section["xy_px"][:, 1].max() < bottom
    # 100 x 60 px of a picture stand for 4,000 x 2,400 px of the slide.
    assert drawn[0].axes[0].images[0].get_extent() == [0, 4000, 2400, 0]
    bar = drawn[0].axes[0].patches[0]
    assert drawn[0].axes[0].texts[0].get_text() == "200 µm"
    assert bar.get_width() == 400  # at 0.5 um a pixel


def test_formats_by_suffix(tmp_path, section):
    gene_maps(tmp_path / "maps.png", **section)
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
        assert picture.width == pytest.approx(7.5 * 300, abs=2)
    gene_maps(tmp_path / "maps.svg", **section)
    svg = (tmp_path / "maps.svg").read_text()
    assert "Plp1</text>" in svg
    assert svg.count("<use") < 200  # 1,600 points are a picture and not a path each
    gene_maps(tmp_path / "maps.pdf", **section)
    assert (tmp_path / "maps.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(InputError, match=r"\.png, \.pdf or \.svg"):
        gene_maps(tmp_path / "maps.jpg", **section)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["maps.pdf", "maps.png", "maps.svg"]


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
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.8, 0.4], [0.4, 0.1], [0, 0.2]])
    texts = [t.get_text() for t in axes.texts]
    assert texts[:2] == ["a", "c"]
    assert texts[2].startswith("42% of the ceiling\n(2 genes")
    monkeypatch.setattr(ceiling, "RELIABLE", 0.5)
    monkeypatch.setattr(figures, "RELIABLE", 0.5)
    pcc_vs_ceiling(per_gene, tmp_path / "c.png")  # as metrics.json has it, under its one threshold
    assert drawn[1].axes[0].texts[-1].get_text() == "50% of the ceiling\n(1 genes with a ceiling ≥ 0.5)"
    pcc_vs_ceiling(per_gene[per_gene["gene"] == "d"], tmp_path / "none.png")  # nothing to show is no error


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
    assert (loss.get_title(), pcc.get_title()) == ("loss", "pcc")
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
    assert left.texts[0].get_text() == "mean 0.60 estimated, 0.50 reached\n(2 genes)" == right.texts[0].get_text()


def test_a_run_marks_the_epoch_that_it_kept(tmp_path, drawn):
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(1.0, (50, 5)))
    table = pd.DataFrame({"gene": list("abcde"), "mean_counts": 1.0, "pcc": 0.2, "ceiling": 0.5})
    slide = contextlib.nullcontext(SimpleNamespace(thumbnail=lambda _: np.zeros((20, 20, 3), dtype=np.uint8)))
    scored = SimpleNamespace(
        result=SimpleNamespace(per_gene=table),
        nuclei=SimpleNamespace(counts=counts, xy_um=rng.random((50, 2)) * 100),
        section=SimpleNamespace(open_slide=lambda: slide, width=200, mpp=0.5),
        umi=counts.toarray(),
    )
    pd.DataFrame({"epoch": [0, 1], "val/loss": [1.0, 2.0]}).to_csv(tmp_path / "metrics.csv", index=False)
    run_figures(tmp_path, scored, SimpleNamespace(genes=list("abcde")), curves=tmp_path / "metrics.csv", best_epoch=1)
    assert [line.get_label() for line in drawn[-1].axes[0].lines] == ["validation", "best epoch (1)"]
