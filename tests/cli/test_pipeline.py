"""The whole way on a small simulated tissue: prepare, train, predict, evaluate."""

import json
from pathlib import Path

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from prts.cli.app import config_dir, run
from prts.cli.prepare import preparation
from prts.cli.train import train
from prts.stopwatch import Stopwatch

pytestmark = pytest.mark.slow

N_GENES = 60


def composed(cache: Path, *overrides: str):
    sections = [
        f"tissue.sections.{name}.simulate.{key}"
        for name in ("train", "val", "test")
        for key in ("cells=400", "genes=150")
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(
            "train",
            [
                *sections,
                f"paths.cache_dir='{cache}'",
                f"panel.n_genes={N_GENES}",
                "trainer.max_epochs=3",
                "trainer.accelerator=cpu",
                "encoder.tile_px=64",  # quicker than 256
                "evaluation.bootstrap=50",
                "logger=none",
                "qc.min_umi=60",  # not the default: prediction and evaluation have to learn it from the bundle
                *overrides,
            ],
        )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache dir, with = and ü")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "full"
    return folder, train(composed(cache), folder)


@pytest.fixture(scope="module")
def test_section(cache):
    (folder,) = (cache / "demo" / "test").glob("section-*/")
    return folder


@pytest.fixture(scope="module")
def predicted(trained, test_section, cache, tmp_path_factory):
    folder, _ = trained
    out = tmp_path_factory.mktemp("a prediction, of = ü") / "slide.h5ad"
    arguments = [f"bundle={folder / 'model'}", f"image={test_section / 'tissue_image.tif'}", f"out={out}"]
    assert run("predict", [*arguments, f"paths.cache_dir={cache}"]) == 0
    return out


def test_a_run_folder_holds_what_it_promises(trained):
    folder, result = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"{metrics['test/pcc_mean']:.3f}" in (folder / "report.html").read_text()
    for part in ("val", "test"):
        for name in ("pcc_mean", "spearman_mean", "rmse_mean", "skill_mean", "ceiling_mean", "auroc", "mcc", "n_cells"):
            assert np.isfinite(metrics[f"{part}/{name}"]), name
    assert metrics["test/n_genes"] == N_GENES
    assert metrics["baseline/gene_mean/pcc_mean"] == 0
    # the simulated tissue is learnable even in three epochs, and ridge knows how to
    assert metrics["baseline/ridge/pcc_mean"] > 0.1
    per_gene = pd.read_csv(folder / "per_gene.csv")
    assert list(per_gene["gene"]) == result.bundle.genes
    assert metrics["test/pcc_mean"] == pytest.approx(per_gene["pcc"].mean())
    kept = json.loads((folder / "model" / "model.json").read_text())["scores"]
    assert kept == {key: value for key, value in metrics.items() if key.startswith(("val/", "test/", "baseline/"))}


def test_the_test_predictions_are_those_that_were_scored(trained):
    folder, result = trained
    prediction = ad.read_h5ad(folder / "predictions.h5ad")
    counts = result.datamodule.test_sets[0].counts.toarray()
    assert list(prediction.obs_names) == list(result.datamodule.test_sets[0].cell_id)
    per_gene = pd.read_csv(folder / "per_gene.csv")
    gene = int(per_gene["pcc"].argmax())
    pcc = np.corrcoef(np.log1p(prediction.X[:, gene].toarray().ravel()), np.log1p(counts[:, gene]))[0, 1]
    assert per_gene["pcc"][gene] > 0
    assert pcc == pytest.approx(per_gene["pcc"][gene], abs=1e-5)
    polygons = gpd.read_parquet(folder / "predictions.nuclei.parquet")
    assert list(polygons["cell_id"]) == list(prediction.obs_names)


def test_panel_and_threshold_come_from_training_and_validation(trained):
    _, result = trained
    metadata = result.bundle.metadata
    assert metadata["train_sections"] == ["train"]
    assert metadata["split"]["n"]["train"] == len(result.datamodule.train_sets[0])
    assert len(result.bundle.val_pcc) == N_GENES
    val = result.metrics["val/pcc_mean"]
    assert np.nanmean(result.bundle.val_pcc) == pytest.approx(val)


def test_prediction_from_the_image_alone_equals_the_runs_own(trained, predicted):
    folder, _ = trained
    whole, tested = ad.read_h5ad(predicted), ad.read_h5ad(folder / "predictions.h5ad")
    assert whole.n_obs >= tested.n_obs  # prediction asks for no UMIs, so quality control leaves nobody out
    same = whole[tested.obs_names]
    np.testing.assert_allclose(same.X.toarray(), tested.X.toarray(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(same.layers["prob"]), np.asarray(tested.layers["prob"]), atol=1e-5)


def test_a_slide_can_be_read_in_the_colours_of_training(trained, predicted, test_section, cache, tmp_path):
    folder, _ = trained
    out = tmp_path / "matched.h5ad"
    arguments = [f"bundle={folder / 'model'}", f"image={test_section / 'tissue_image.tif'}", f"out={out}"]
    assert run("predict", [*arguments, f"paths.cache_dir={cache}", "stain=reinhard"]) == 0
    matched, plain = ad.read_h5ad(out), ad.read_h5ad(predicted)
    assert (matched.uns["prts"]["stain"], plain.uns["prts"]["stain"]) == ("reinhard", "none")
    means = [np.asarray(data.X.mean(axis=0)).ravel() for data in (matched, plain)]
    assert np.abs(means[0] - means[1]).max() > 1e-3
    assert np.corrcoef(np.log1p(means))[0, 1] > 0.9


def test_evaluate_agrees_with_the_runs_test(trained, predicted, test_section, tmp_path):
    _, result = trained
    arguments = [
        f"prediction={predicted}",
        f"section={test_section}",
        f"out={tmp_path / 'e'}",
        "evaluation.bootstrap=50",
    ]
    assert run("evaluate", arguments) == 0
    again = json.loads((tmp_path / "e" / "metrics.json").read_text())
    for key, value in again.items():
        if value is not None:
            assert value == pytest.approx(result.metrics[key], abs=1e-4), key


def test_what_is_prepared_is_not_made_again(cache, trained):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    stopwatch = Stopwatch()
    preparation(composed(cache))[0](stopwatch)
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if not p.name.endswith(".lock")} == {
        p: t for p, t in before.items() if not p.name.endswith(".lock")
    }


def test_the_same_seed_gives_the_same_metrics_whatever_the_workers_and_another_seed_others(cache, trained, tmp_path):
    def figures(folder):
        metrics = json.loads((folder / "metrics.json").read_text())
        return {key: value for key, value in metrics.items() if not key.startswith(("seconds/", "peak_rss_mb"))}

    first = figures(trained[0])
    for overrides in (["data.num_workers=2"], ["seed=1"]):
        folder = tmp_path / overrides[0]
        train(composed(cache, *overrides, "report=false"), folder)
        assert (figures(folder) == first) == (overrides != ["seed=1"])


@pytest.mark.parametrize(("ablation", "used"), [("local_only", ["local"]), ("global_only", ["global"])])
def test_an_ablation_uses_one_of_the_inputs(cache, ablation, used):
    assert composed(cache, f"ablation={ablation}").data.use == used


@pytest.mark.parametrize(
    ("ablation", "width"), [("local_only", 192), pytest.param("global_only", 384, marks=pytest.mark.nightly)]
)
def test_an_ablation_changes_the_input_width(cache, trained, tmp_path, ablation, width):
    result = train(composed(cache, f"ablation={ablation}", "report=false"), tmp_path / ablation)
    assert result.bundle.net.in_features == width
    assert result.datamodule.in_features == width
