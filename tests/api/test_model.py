"""The Python interface: train, predict, evaluate, save, load, without Hydra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch
from PIL import Image

import prts
from prts.api.polygons import nuclei_of
from prts.simulate.section import simulate_section

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def predicted(trained, sections, cache):
    return trained.predict(sections["third"], nuclei="watershed", cache_dir=cache)


def test_training_returns_one_row_per_epoch(trained):
    history = trained.history
    assert history["epoch"].tolist() == list(range(len(history)))
    assert {"train/loss", "val/loss", "val/pcc"} <= set(history.columns)
    assert history["train/loss"].iloc[-1] < history["train/loss"].iloc[0]
    assert trained.metrics["val/n_genes"] == 60


def test_a_prediction_in_memory_is_what_the_file_holds(trained, sections, cache, predicted, tmp_path):
    backed = trained.predict(sections["third"], nuclei="watershed", out=tmp_path / "slide.h5ad", cache_dir=cache)
    assert backed.isbacked
    written = ad.read_h5ad(tmp_path / "slide.h5ad")
    assert predicted.obs_names.equals(written.obs_names)
    np.testing.assert_array_equal(predicted.X.toarray(), written.X.toarray())
    polygons = gpd.read_parquet(tmp_path / "slide.nuclei.parquet")
    attached = nuclei_of(predicted[5:9])
    assert attached["cell_id"].tolist() == polygons["cell_id"].tolist()[5:9]
    assert shapely.equals_exact(attached.geometry.to_numpy(), polygons.geometry.to_numpy()[5:9]).all()


def test_scores_stand_next_to_baselines_and_ceiling(trained, sections, cache, predicted):
    scores = trained.evaluate(predicted, sections["third"], cache_dir=cache)
    summary = scores.summary
    assert summary["test/n_genes"] == 60 == len(scores.per_gene)
    assert 0 < summary["test/pcc_mean"] < summary["test/ceiling_mean"] < 1
    assert abs(summary["baseline/gene_mean/pcc_mean"]) < 1e-6
    assert {f"baseline/{name}/pcc_mean" for name in ("colour", "context", "morphology", "ridge")} <= set(summary)
    assert "noise ceiling" in str(scores)


def test_a_subset_of_nuclei_can_be_evaluated(sections, predicted):
    half = predicted[: predicted.n_obs // 2]
    assert (
        prts.evaluate(half, sections["third"]).summary["test/n_cells"]
        < prts.evaluate(predicted, sections["third"]).summary["test/n_cells"]
    )


def test_a_saved_model_predicts_the_same(trained, sections, cache, predicted, tmp_path):
    trained.save(tmp_path / "model")
    loaded = prts.Model.load(tmp_path / "model")
    again = loaded.predict(sections["third"], nuclei="watershed", cache_dir=cache)
    np.testing.assert_array_equal(again.X.toarray(), predicted.X.toarray())
    assert str(loaded) == str(trained)
    assert "60 genes" in str(loaded)
    assert loaded.per_gene.index.tolist() == loaded.genes == again.var_names.tolist()


def test_polygons_may_come_as_a_frame(trained, sections, cache, predicted):
    nuclei = nuclei_of(predicted)[["cell_id", "geometry"]]
    again = trained.predict(sections["third"], nuclei=nuclei, cache_dir=cache)
    assert again.obs_names.equals(predicted.obs_names)
    np.testing.assert_allclose(again.X.toarray(), predicted.X.toarray(), rtol=1e-4, atol=1e-5)


def test_context_and_polygons_need_no_encoder(sections, tmp_path):
    model = prts.Model("classical", features=("context", "morphology"), network={"hidden": (64,)})
    settings = {"nuclei": "watershed", "genes": 40, "max_epochs": 10, "cache_dir": tmp_path / "cache"}
    model.train([sections["first"]], validation=[sections["second"]], **settings)
    about = model.bundle.metadata
    assert about["encoder"]["name"] == "none"
    assert about["input"]["use"] == ["context", "morphology"]
    assert about["input"]["widths"] == {"context": 42, "morphology": 21}
    model.save(tmp_path / "model")
    loaded = prts.Model.load(tmp_path / "model")
    prediction = loaded.predict(sections["third"], nuclei="watershed", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("features-*"))
    assert list((tmp_path / "cache/predict").rglob("context-????????.h5"))
    scores = loaded.evaluate(prediction, sections["third"], cache_dir=tmp_path / "cache").summary
    assert scores["baseline/context/pcc_mean"] > 0.02
    assert scores["test/pcc_mean"] > 0.02


def test_a_model_of_matched_slides_matches_a_new_one(
    sections, encoder, cache, predicted, tmp_path, monkeypatch, caplog
):
    for module in ("data.datamodule", "models.predict", "api.baselines"):
        monkeypatch.setattr(f"prts.{module}.FEWEST", 100)
    model = prts.Model(encoder, network={"hidden": (64,)})
    options = {"nuclei": "watershed", "cache_dir": cache}
    model.train(
        [sections["first"]],
        validation=[sections["second"]],
        genes=60,
        max_epochs=2,
        scale="slide",
        trainer={"accelerator": "cpu"},
        **options,
    )
    model.save(tmp_path / "model")
    loaded = prts.Model.load(tmp_path / "model")
    assert loaded.bundle.metadata["input"]["scale"] == "slide"
    caplog.clear()
    whole = loaded.predict(sections["third"], **options)
    assert "used as they are" not in caplog.text
    scores = loaded.evaluate(whole, sections["third"], cache_dir=cache)
    assert min(scores.summary["test/pcc_mean"], scores.summary["baseline/ridge/pcc_mean"]) > 0
    edge = 0.7 * sections["third"].width
    part = loaded.predict(sections["third"], roi=[0, 0, edge, sections["third"].height], **options)
    assert "used as they are" not in caplog.text
    assert 100 < part.n_obs < whole.n_obs  # a region is matched by its slide, whose nuclei are all in the sample
    np.testing.assert_allclose(part.X.toarray(), whole[part.obs_names].X.toarray(), rtol=1e-3, atol=1e-6)
    regional = loaded.evaluate(part, sections["third"], cache_dir=cache).summary
    assert "baseline/colour/pcc_mean" in regional and "baseline/ridge/pcc_mean" not in regional


def test_without_validation_sections_blocks_are_held_out(cache, tmp_path):
    simulate_section(tmp_path / "large", cells=1500, genes=100, seed=4)
    model = prts.Model("classical", features=("morphology",))
    model.train([prts.read_visium_hd(tmp_path / "large")], nuclei="watershed", genes=40, max_epochs=2, cache_dir=cache)
    assert model.bundle.metadata["split"]["split"]["name"] == "blocks"
    assert np.isfinite(model.metrics["test/pcc_mean"])


def test_an_untrained_model_refuses(sections, tmp_path):
    model = prts.Model("classical")
    assert "untrained" in str(model)
    with pytest.raises(prts.InputError, match=r"not trained; call train\(\)"):
        model.predict(sections["third"])
    with pytest.raises(prts.InputError, match="not trained"):
        model.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "clasical"}, "did you mean 'classical'"),
        ({"encoder": "classical", "likelihood": "poison"}, "did you mean 'poisson'"),
        ({"encoder": "classical", "network": {"hiden": [5]}}, "did you mean 'hidden'"),
        ({"encoder": "classical", "network": {"hidden": 5}}, "network hidden"),
        ({"encoder": "classical", "features": ["locale"]}, "did you mean 'local'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(prts.InputError, match=message):
        prts.Model(**arguments)


def test_a_folder_with_other_files_is_not_replaced(trained, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(prts.InputError, match="holds other files"):
        trained.save(tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_importing_prts_loads_nothing_heavy():
    code = "import sys, prts; print(sorted({'torch', 'pandas', 'hydra', 'numpy', 'anndata'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_library_does_not_know_hydra():
    root = Path(prts.__file__).parent
    for file in root.rglob("*.py"):
        if "cli" not in file.relative_to(root).parts:
            text = file.read_text(encoding="utf-8")
            assert "import hydra" not in text and "from hydra" not in text and "omegaconf" not in text, file


@pytest.fixture(scope="module")
def blue_slide(sections, tmp_path_factory) -> Path:
    """A slide with red and blue exchanged, like no slide of the training tissue."""
    pixels = np.asarray(Image.open(sections["third"].image).convert("RGB"))
    path = tmp_path_factory.mktemp("blue") / "blue.png"
    Image.fromarray(np.ascontiguousarray(pixels[..., ::-1])).save(path)
    return path


def test_a_prediction_not_to_be_believed_is_a_warning(trained, blue_slide, cache, tmp_path, caplog):
    arguments = {"nuclei": "watershed", "mpp": 0.5, "cache_dir": cache, "check_image": False, "check_scale": False}
    out = tmp_path / "blue.h5ad"
    with pytest.raises(prts.InputError, match=r"blue.png: .*should not be believed.*strict=false"):
        trained.predict(blue_slide, out=out, strict=True, **arguments)
    assert not list(tmp_path.iterdir())
    trained.predict(blue_slide, out=out, **arguments)
    assert any(
        record.levelname == "WARNING" and "should not be believed" in record.message for record in caplog.records
    )
    adata = ad.read_h5ad(out)
    assert not adata.uns["prts"]["believable"]


def test_expected_counts_have_a_limit(trained, sections, cache):
    limits = trained.bundle.metadata["limits"]
    net = trained.bundle.net
    features = torch.full((4, net.in_features), 1e4)
    umi, _ = trained.bundle.predict(features)
    top = torch.tensor(limits["highest"]) * limits["multiple"]
    assert (umi <= top).all() and (umi == top).any()
    normal = trained.predict(sections["third"], nuclei="watershed", cache_dir=cache)
    assert normal.obs["n_capped"].max() == 0
