"""A model trained on corrected counts is evaluated, analyzed and reported on corrected counts, without being told again."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from prts.cli.app import config_dir, run
from prts.cli.train import train
from prts.evaluation.settings import EvaluationSettings
from prts.io.prediction import read_prediction
from prts.report.load import load_prediction, load_run

pytestmark = pytest.mark.slow

SHIFT_UM = 6.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run_folder(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small training run on sections whose bins are 6 um off."""
    simulate = [
        f"tissue.sections.{name}.simulate.{key}"
        for name in ("train", "val", "test")
        for key in ("cells=400", "genes=150", "shift_um=[6.0,0.0]")
    ]
    simulate = [f"+{override}" if "shift_um" in override else override for override in simulate]
    small = [
        "panel.n_genes=30",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        "evaluation.bootstrap=10",
        "logger=none",
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "train", [*simulate, *small, f"paths.cache_dir='{cache}'", "preprocess.register=true", "report=false"]
        )
    folder = tmp_path_factory.mktemp("runs") / "registered"
    train(cfg, folder)
    return folder


@pytest.fixture(scope="module")
def predicted(cache: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prediction of the test section with the run's model, and the section's folder."""
    (section,) = (cache / "demo" / "test").glob("section-*/")
    out = tmp_path_factory.mktemp("predicted") / "slide.h5ad"
    given = [f"bundle={run_folder / 'model'}", f"image={section / 'tissue_image.tif'}", f"out={out}"]
    assert run("predict", [*given, f"paths.cache_dir={cache}"]) == 0
    return out, section


def test_the_bundle_and_predictions_say_that_training_registered(
    run_folder: Path, predicted: tuple[Path, Path]
) -> None:
    assert json.loads((run_folder / "model" / "model.json").read_text())["register"] is True
    for path in (run_folder / "predictions.h5ad", predicted[0]):
        assert bool(read_prediction(path).uns["prts"]["register"])


def test_evaluate_analyze_and_report_count_the_same_corrected_counts(
    cache: Path, predicted: tuple[Path, Path], tmp_path: Path
) -> None:
    prediction, section = predicted
    given = [f"prediction={prediction}", f"section={section}"]
    assert run("evaluate", [*given, f"out={tmp_path / 'evaluated'}", "evaluation.bootstrap=10"]) == 0
    assert run("analyze", [*given, f"out={tmp_path / 'analyzed'}", "figures=[]", "clusters.resolution=0.2"]) == 0
    source = load_prediction(prediction, section / "tissue_image.tif", section, None, EvaluationSettings(bootstrap=10))

    (prepared,) = (ad.read_h5ad(path) for path in (cache / "demo" / "test").glob("counts-*.h5ad"))
    registration = prepared.uns["prts"]["registration"]
    assert registration["corrected"] and registration["shift_x_um"] == pytest.approx(SHIFT_UM, abs=0.5)
    # in `predict` as in `prepare`, the nuclei are all that the segmenter finds
    reported = pd.DataFrame(source.scored.nuclei.counts.toarray(), source.scored.nuclei.cell_id)
    genes = read_prediction(prediction).var_names
    assert set(reported.index) == set(prepared.obs_names)
    np.testing.assert_array_equal(reported.loc[prepared.obs_names], prepared[:, genes].X.toarray())
    analyzed = ad.read_h5ad(tmp_path / "analyzed" / "measured.h5ad")
    shared = analyzed.obs_names
    np.testing.assert_array_equal(analyzed.obs["total_counts"], prepared.obs.loc[shared, "total_counts"])
    mean = pd.read_csv(tmp_path / "evaluated" / "per_gene.csv").set_index("gene").loc[genes, "mean_counts"]
    np.testing.assert_allclose(mean, reported.mean(), rtol=1e-6)


def test_uncorrected_counts_are_there_for_the_asking(predicted: tuple[Path, Path], tmp_path: Path) -> None:
    prediction, section = predicted
    given = [f"prediction={prediction}", f"section={section}", "evaluation.bootstrap=10"]
    total = {}
    for register in ("null", "false"):
        out = tmp_path / register
        assert run("evaluate", [*given, f"preprocess.register={register}", f"out={out}"]) == 0
        total[register] = pd.read_csv(out / "per_gene.csv")["mean_counts"].sum()
    assert total["null"] > 1.1 * total["false"]


def test_the_report_of_the_run_shows_the_counts_that_were_learned_from(cache: Path, run_folder: Path) -> None:
    (source,) = load_run(run_folder, EvaluationSettings(bootstrap=10))
    (prepared,) = (ad.read_h5ad(path) for path in (cache / "demo" / "test").glob("counts-*.h5ad"))
    learned = prepared[source.scored.nuclei.cell_id, source.page.prediction.var_names].X.sum()
    # those that failed quality control are not in the file, so bins that they shared are no longer dropped
    assert source.scored.nuclei.counts.sum() == pytest.approx(learned, rel=0.02)
