from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prts.report import analysis_charts as charts
from prts.report import analysis_figures as figures
from prts.report.figures_canvas import GREY


def test_groups_keep_their_colours_and_unassigned_is_grey() -> None:
    first = figures.group_colours([pd.Series(["B", "A", None, "unassigned"])])
    assert list(first) == ["A", "B", "unassigned"]
    assert first["unassigned"] == GREY
    # clusters by number and not by text: the tenth does not come second
    assert list(figures.group_colours([pd.Series(["10", "2", "1"], dtype="category")]))[:3] == ["1", "2", "10"]
    assert len(set(figures.group_colours([pd.Series(list("abcdefghijklmnop"))]).values())) == 17


def test_a_group_is_drawn_where_its_nuclei_lie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1000, (4000, 2))
    nuclei = ad.AnnData(
        obs=pd.DataFrame({"type": np.where(xy[:, 0] < 500, "left", "right")}, index=[f"n{i}" for i in range(4000)])
    )
    nuclei.obs["type"] = nuclei.obs["type"].astype("category")
    nuclei.obsm["spatial"] = xy
    colours = {"left": "#ff0000", "right": "#0000ff"}
    figures.tissue_groups([tmp_path / "t.png", tmp_path / "t.pdf"], {"predicted": nuclei}, "type", "type", colours, 0.5)
    pixels = np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).astype(int)
    red = np.argwhere((pixels[..., 0] > 200) & (pixels[..., 2] < 50))
    blue = np.argwhere((pixels[..., 2] > 200) & (pixels[..., 0] < 50))
    assert len(red) > 10_000
    assert np.percentile(red[:, 1], 90) < np.percentile(blue[:, 1], 10)
    assert (tmp_path / "t.pdf").stat().st_size > 1000


@pytest.mark.parametrize("columns", [["measured", "predicted"], ["predicted"]])
def test_shares_are_drawn_with_and_without_a_measurement(tmp_path: Path, columns: list[str]) -> None:
    table = pd.DataFrame({"name": ["A", "B"], **{column: [0.75, 0.25] for column in columns}})
    charts.type_shares([tmp_path / "s.png"], table, {"A": "#ff0000", "B": "#0000ff"})
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    # slices of the pies: three quarters and one quarter
    red = ((pixels[..., 0] > 250) & (pixels[..., 1:].max(axis=-1) < 5)).sum()
    blue = ((pixels[..., 2] > 250) & (pixels[..., :2].max(axis=-1) < 5)).sum()
    assert red / blue == pytest.approx(3, rel=0.05)


def test_enrichment_and_confusion_are_drawn(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "cluster": ["0", "1"],
            "namespace": ["BP", "MF"],
            "name": ["a process", "a function"],
            "p_adj": [1e-4, 0.1],
            "n_found": [5, 20],
        }
    )
    charts.enrichment_dots([tmp_path / "e.png"], table)
    counts = pd.DataFrame([[3, 1], [0, 0]], index=["A", "B"], columns=["A", "B"])
    charts.confusion_matrix([tmp_path / "c.png"], counts, "types")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("e.png", "c.png"))
