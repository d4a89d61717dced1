"""Artefacts: what the simulator plants is found, and clean tissue is left alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile

from prts.errors import InputError
from prts.io.nuclei import load_nuclei, make_nuclei
from prts.preprocess.artefacts import KINDS, find_artefacts, is_artefact
from prts.section import open_section_folder
from prts.simulate.section import simulate_section


@pytest.mark.slow
def test_what_is_planted_is_found_and_the_rest_is_left_alone(tmp_path: Path):
    section = simulate_section(tmp_path / "s", cells=1200, genes=50, seed=4, artefacts=1)
    truth = ad.read_h5ad(section / "truth.h5ad").obs["artefact"]
    nuclei = load_nuclei(section / "truth_nuclei.parquet")
    with open_section_folder(section).open_slide() as slide:
        found = pd.Series(find_artefacts(slide, nuclei), index=nuclei["cell_id"]).loc[truth.index]
    planted, flagged = truth != "none", found != "none"
    assert planted.sum() > 50
    assert (planted & flagged).sum() / planted.sum() > 0.5
    assert (planted & flagged).sum() / flagged.sum() > 0.85


@pytest.mark.slow
def test_clean_tissue_has_next_to_none(tmp_path: Path):
    section = simulate_section(tmp_path / "s", cells=600, genes=50, seed=1)
    nuclei = load_nuclei(section / "truth_nuclei.parquet")
    with open_section_folder(section).open_slide() as slide:
        assert is_artefact(pd.DataFrame({"artefact": find_artefacts(slide, nuclei)})).mean() < 0.01


def test_a_speck_on_glass_and_a_bent_clump_are_flagged(tmp_path: Path):
    """Pink tissue left, glass right; nuclei of 100 px each, one of them on glass, and one seven times as large, in the shape of an L."""
    rng = np.random.default_rng(0)
    image = np.full((600, 900, 3), 245, np.uint8)
    image[:, :600] = np.clip(rng.normal([215, 160, 200], 6, (600, 600, 3)), 0, 255)
    tifffile.imwrite(
        tmp_path / "tissue_image.tif", image, photometric="rgb", resolution=(20_000, 20_000), resolutionunit=3
    )
    squares = [shapely.box(x, y, x + 10, y + 10) for x in range(100, 500, 100) for y in range(100, 500, 100)]
    clump = shapely.union(shapely.box(250, 250, 290, 260), shapely.box(250, 250, 260, 290))  # 700 px in a hull of 1,150
    nuclei = make_nuclei([*squares, shapely.box(800, 300, 810, 310), clump], 0.5)
    with open_section_folder(tmp_path).open_slide() as slide:
        kinds = list(find_artefacts(slide, nuclei))
    assert kinds == ["none"] * len(squares) + ["glass", "aggregate"]


def test_nobody_looked_means_no_artefact():
    assert not is_artefact(pd.DataFrame(index=["a", "b"])).any()


@pytest.mark.parametrize("artefacts", [-1, 101])
def test_absurd_numbers_of_artefacts_are_refused(tmp_path: Path, artefacts: int):
    with pytest.raises(InputError, match="artefacts"):
        simulate_section(tmp_path / "s", cells=50, genes=50, artefacts=artefacts)


@pytest.mark.slow
def test_prepare_marks_them_and_leaves_them_out_of_training(tmp_path: Path, caplog):
    from hydra import compose, initialize_config_dir

    from prts.cli.app import config_dir
    from prts.cli.prepare import preparation
    from prts.stopwatch import Stopwatch

    simulate = "tissue.sections.train.simulate"
    small = [f"{simulate}.cells=300", f"{simulate}.genes=150", f"+{simulate}.artefacts=1"]
    rest = ["tissue.val=[]", "tissue.test=[]", "split=random", "panel.n_genes=40", f"paths.cache_dir='{tmp_path}'"]
    rest += ["encoder.tile_px=64"]  # quicker than 256
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        plain = compose("prepare", [*small, *rest])
        looked = compose("prepare", [*small, *rest, "preprocess.artefacts=true"])
    before, after = (preparation(cfg)[0](Stopwatch()) for cfg in (plain, looked))
    without, counts = (ad.read_h5ad(p.sections["train"].counts) for p in (before, after))
    assert "artefact" not in without.obs
    assert list(counts.obs_names) == list(without.obs_names)
    assert tuple(counts.obs["artefact"].cat.categories) == KINDS
    flagged = is_artefact(counts.obs)
    assert flagged.sum() > 5
    assert sum(counts.uns["prts"]["artefacts"].values()) == flagged.sum()
    assert after.sections["train"].features == before.sections["train"].features

    from prts.data.datamodule import _rows
    from prts.data.splits import TEST, TRAIN

    loaded = SimpleNamespace(row=np.arange(counts.n_obs), artefact=flagged)
    assert not flagged[_rows(loaded, np.full(counts.n_obs, TRAIN, np.int8), TRAIN)].any()
    assert len(_rows(loaded, np.full(counts.n_obs, TEST, np.int8), TEST)) == counts.n_obs
