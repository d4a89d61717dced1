"""A model that was trained on corrected counts is evaluated, analyzed and reported on corrected counts, without being told again."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from prts.cli.app import run
from prts.data.prepare import PrepareSettings, prepare_sections
from prts.data.splits import Random, Roles
from prts.evaluation.settings import EvaluationSettings
from prts.features.encoders import Classical
from prts.io.prediction import read_prediction
from prts.models.bundle import save_bundle
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.output import OutputRule
from prts.preprocess.counts import QCSettings
from prts.preprocess.panel import Panel, TopPanel
from prts.report.load import load_prediction
from prts.section import read_visium_hd
from prts.segmentation.watershed import Watershed
from prts.simulate.section import simulate_section

pytestmark = pytest.mark.slow

SHIFT_UM = 6.0
ENCODER = Classical(tile_px=64)  # quicker than 256
QC = QCSettings(min_umi=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A section whose bins are 6 um off."""
    out = tmp_path_factory.mktemp("section") / "s"
    return simulate_section(out, cells=400, genes=150, seed=5, shift_um=[SHIFT_UM, 0.0])


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ad.AnnData, Panel]:
    """Its counts and its panel as training gets them."""
    settings = PrepareSettings(
        segmenter=Watershed(),
        splitter=Random(),
        panel=TopPanel(n_genes=30),
        encoder=ENCODER,
        cache_dir=tmp_path_factory.mktemp("cache"),
        qc=QC,
        register=True,
    )
    tissue = prepare_sections("t", "human", {"s": read_visium_hd(folder)}, Roles(["s"], [], []), settings)
    assert tissue.register
    return ad.read_h5ad(tissue.sections["s"].counts), Panel.from_json(tissue.panel)


@pytest.fixture(scope="module")
def prediction(folder: Path, prepared: tuple[ad.AnnData, Panel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a bundle that says `register` predicts."""
    root = tmp_path_factory.mktemp("predicted")
    panel = prepared[1]
    metadata = {
        "encoder": ENCODER.settings(),
        "encoder_weights": None,
        "mpp": 0.5,
        "tile": 64,
        "pooling": "nucleus",
        "input": {"use": ["local", "global"], "widths": {"local": 192, "global": 384}},
        "segmentation": {"name": "watershed", "arguments": {}},
        "qc": QC.settings(),
        "register": True,
        "tissue": "t",
        "species": "human",
        "train_sections": ["s"],
        "split": {},
        "seed": 0,
        "validation": {},
    }
    torch.manual_seed(0)
    save_bundle(
        root / "model",
        net=PRTSNet(576, len(panel.genes), hidden=(4,)),
        likelihood=Paper(target="log1p").allocate(len(panel.genes)),
        rule=OutputRule("none", 0.5),
        genes=list(zip(panel.genes, panel.gene_ids, strict=True)),
        metadata=metadata,
    )
    given = [f"bundle={root / 'model'}", f"image={folder / 'tissue_image.tif'}", f"out={root / 'slide.h5ad'}"]
    assert run("predict", [*given, f"paths.cache_dir={root / 'cache'}", "artefacts=false"]) == 0
    return root / "slide.h5ad"


def test_evaluate_analyze_and_report_count_what_was_learned_from(
    folder: Path, prepared: tuple[ad.AnnData, Panel], prediction: Path, tmp_path: Path
) -> None:
    counts, panel = prepared
    registration = counts.uns["prts"]["registration"]
    assert registration["corrected"] and registration["shift_x_um"] == pytest.approx(SHIFT_UM, abs=0.5)
    assert bool(read_prediction(prediction).uns["prts"]["register"])
    # `predict` segments as `prepare` did, so the nuclei are the same
    learned = pd.DataFrame(panel.align(counts).toarray(), counts.obs_names)

    source = load_prediction(prediction, folder / "tissue_image.tif", folder, None, EvaluationSettings(bootstrap=10))
    reported = pd.DataFrame(source.scored.nuclei.counts.toarray(), source.scored.nuclei.cell_id)
    assert set(reported.index) == set(learned.index)
    np.testing.assert_array_equal(reported.loc[learned.index], learned)

    given = [f"prediction={prediction}", f"section={folder}"]
    assert run("evaluate", [*given, f"out={tmp_path / 'evaluated'}", "evaluation.bootstrap=10"]) == 0
    evaluated = pd.read_csv(tmp_path / "evaluated" / "per_gene.csv").set_index("gene")
    np.testing.assert_allclose(evaluated.loc[list(panel.genes), "mean_counts"], learned.mean(), rtol=1e-6)

    small = ["clusters.n_top_genes=20", "clusters.n_pcs=5", "clusters.resolution=0.2", "figures=[]"]
    assert run("analyze", [*given, f"out={tmp_path / 'analyzed'}", *small]) == 0
    analyzed = ad.read_h5ad(tmp_path / "analyzed" / "measured.h5ad")
    assert analyzed.n_obs > 50
    np.testing.assert_array_equal(analyzed.obs["total_counts"], counts.obs.loc[analyzed.obs_names, "total_counts"])


def test_evaluate_takes_uncorrected_counts_if_asked(folder: Path, prediction: Path, tmp_path: Path) -> None:
    given = [f"prediction={prediction}", f"section={folder}", "evaluation.bootstrap=10"]
    total = {}
    for register in ("null", "false"):
        out = tmp_path / register
        assert run("evaluate", [*given, f"preprocess.register={register}", f"out={out}"]) == 0
        table = pd.read_csv(out / "per_gene.csv")
        total[register] = table["mean_counts"].sum()
    assert total["null"] > 1.1 * total["false"]
